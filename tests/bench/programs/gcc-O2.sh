# 10,000 lines: 700 functions of 14.
awk 'BEGIN {
    print "#include <stdio.h>\n#include <string.h>\n"
    for (i = 0; i < 700; i++) {
        print "struct s" i " { int a, b[4]; const char *name; };\n"
        print "static int f" i "(struct s" i " *p, int n)\n{\n\tint r = " i * 7 % 101 ";"
        print "\tif (n % " i % 13 + 2 " == 0)\n\t\tr += p->a * " i % 37 + 3 ";\n\telse\n\t\tp->b[n & 3] ^= r >> " i % 11 + 1 ";"
        print "\tr += strlen(p->name) + p->b[" i % 4 "];\n\treturn r;\n}"
    }
    print "int main(void)\n{\n\tint sum = 0;"
    for (i = 0; i < 700; i++) print "\tstruct s" i " v" i " = { " i ", { 1, 2, 3, 4 }, \"s" i "\" };\n\tsum += f" i "(&v" i ", sum);"
    print "\tprintf(\"%d\\n\", sum);\n}"
}' >t.c
wc -l t.c
begin
gcc -O2 -c t.c
finish
sha256sum t.o
gcc t.o -o t && ./t
