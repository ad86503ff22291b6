# 600 commits to 200 files.
awk 'BEGIN {
    for (c = 1; c <= 600; c++) {
        text = ""
        for (i = 0; i < 300; i++) text = text "line " i " of " (c + i) % 50 ": " (c * i * 7919) % 100003 "\n"
        print "commit refs/heads/main\nmark :" c "\ncommitter A <a@example.org> " 1700000000 + c " +0000\ndata 7\ncommit"
        if (c > 1) print "from :" c - 1
        print "M 100644 inline dir" c % 10 "/file" c % 200 "\ndata " length(text) "\n" text
    }
}' >stream
git init -q -b main repo && cd repo
git -c fastimport.unpackLimit=100000 fast-import --quiet <../stream
git count-objects
begin
git -c gc.pruneExpire=now -c pack.threads=1 gc -q
finish
git count-objects -v | grep -E '^(count|in-pack|packs|size-pack)'
git rev-parse main
git fsck
