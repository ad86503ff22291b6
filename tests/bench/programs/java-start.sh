begin
for i in 1 2; do java -Xmx256m -XX:+UseSerialGC -version 2>&1; done
finish 2
