# 4 MB of what is there in every image: programs.
cat /usr/bin/perl /usr/bin/gawk /usr/bin/git | head -c 4000000 >data
begin
xz -9 -T1 -k data
finish
sha256sum data.xz
xz -dc data.xz | cmp - data && echo same
