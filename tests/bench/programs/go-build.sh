export GOCACHE=/tmp/gocache GOFLAGS=-mod=mod GOPROXY=off
mkdir -p m/text && cd m
echo 'module example.org/m' >go.mod
awk 'BEGIN {
    print "package text\n\nimport (\n\t\"sort\"\n\t\"strings\"\n)\n"
    for (i = 0; i < 150; i++) print "func F" i "(words []string) map[string]int {\n\tm := map[string]int{}\n\tfor n, w := range words {\n\t\tif strings.Contains(w, \"" i % 10 "\") {\n\t\t\tm[strings.ToUpper(w)] += n * " i "\n\t\t} else {\n\t\t\tm[w[:len(w)/2]]++\n\t\t}\n\t}\n\tsort.Strings(words)\n\treturn m\n}\n"
}' >text/text.go
awk 'BEGIN {
    print "package main\n\nimport (\n\t\"fmt\"\n\t\"strings\"\n\n\t\"example.org/m/text\"\n)\n\nfunc main() {\n\tn := 0"
    for (i = 0; i < 150; i++) print "\tn += len(text.F" i "(strings.Fields(\"a1 b2 c3 d4 " i "\")))"
    print "\tfmt.Println(n)\n}"
}' >main.go
begin
go build -o m .
finish
./m
sha256sum m
