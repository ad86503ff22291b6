cat /usr/lib/x86_64-linux-gnu/*.so.* | head -c 50000000 >data
begin
zstd -q -3 --single-thread data -o data.zst
zstd -q -d -c data.zst | sha256sum
finish
sha256sum data data.zst
