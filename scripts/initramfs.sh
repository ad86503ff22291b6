#!/usr/bin/env bash
# initramfs.sh AGENT OUT: the guest's initramfs, the agent as /init and nothing else: an uncompressed cpio archive in
# the "newc" form (Linux: Documentation/driver-api/early-userspace/buffer-format.rst), the same bytes for the same
# agent. /dev/console comes with the kernel's own built-in archive.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
[ $# -eq 2 ] || fail 2 "usage: initramfs.sh AGENT OUT"
agent=$1
out=$2
[ -r "$agent" ] || fail 1 "$agent is missing: build the agent first"

# Every guest's memory and every boot pay for each byte of it.
limit=$((3 << 20))
size=$(stat -c %s "$agent")
[ "$size" -lt "$limit" ] || fail 1 "the agent has $size bytes, it must stay below $limit: see what a new dependency brings (guest-agent/src/spec.rs)"

# entry NAME MODE LINKS SIZE: a member's header and name, padded to four bytes.
entry() {
    local name=$1 mode=$2 links=$3 size=$4
    # magic, inode, mode, uid, gid, links, mtime, size, device, rdevice, length of the name with its zero, checksum
    printf '070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\0' \
        0 "$mode" 0 0 "$links" 0 "$size" 0 0 0 0 $((${#name} + 1)) 0 "$name"
    pad $((110 + ${#name} + 1))
}

# pad LENGTH: zeros up to the next multiple of four.
pad() { head -c $(((4 - $1 % 4) % 4)) /dev/zero; }

{
    entry init $((8#100755)) 1 "$size"
    cat "$agent"
    pad "$size"
    entry 'TRAILER!!!' 0 1 0
} >"$out.new"
if cmp -s "$out.new" "$out"; then rm "$out.new"; else mv "$out.new" "$out"; fi
