# From source: the compiler, itself a Java program, is part of it.
cat >T.java <<'J'
import java.util.*;
public class T {
    public static void main(String[] a) {
        long s = 1;
        for (int i = 0; i < 300_000_000; i++) s = s * 6364136223846793005L + 1442695040888963407L;
        System.out.println(s);
        int n = 300;
        double[][] x = new double[n][n], y = new double[n][n], z = new double[n][n];
        for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) { x[i][j] = (i + j) % 7 / 3.0; y[i][j] = i * j % 11 / 5.0; }
        for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) { double t = 0; for (int k = 0; k < n; k++) t += x[i][k] * y[k][j]; z[i][j] = t; }
        System.out.println(Arrays.stream(z).flatMapToDouble(Arrays::stream).sum());
        Map<String, Integer> m = new TreeMap<>();
        for (int i = 0; i < 1_000_000; i++) m.merge("k" + i % 5000, i, Integer::sum);
        System.out.println(m.size() + " " + m.get("k77"));
    }
}
J
begin
java -Xmx256m -XX:+UseSerialGC T.java
finish
