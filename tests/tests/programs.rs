//! Real programs in a microVM and on the host's own processor: the output is the same.

use std::sync::OnceLock;

use mvm_tests::{Chroot, World};

fn debian() -> &'static Chroot {
    static TREE: OnceLock<Chroot> = OnceLock::new();
    TREE.get_or_init(|| Chroot::new(&World::shared().image_file("debian")))
}

/// Runs `script` in a container and in a chroot of the same Debian image, and compares.
#[track_caller]
fn same_on_debian(script: &str) {
    let native = debian().sh(script).expect_code(0);
    let guest =
        World::shared().mvm(&["run", "--rm", "-e", "HOME=/root", "debian", "sh", "-c", script]);
    assert_eq!(guest.out(), native.out(), "stderr of the guest: {}", guest.err());
    assert_eq!(guest.code, 0, "stderr of the guest: {}", guest.err());
    assert!(!native.stdout.is_empty(), "a comparison of nothing");
}

#[test]
fn python() {
    same_on_debian(
        r#"python3 -c '
import hashlib, json, math, struct, decimal, fractions, zlib, random
random.seed(7)
data = bytes(random.randrange(256) for _ in range(200000))
for name in sorted(("md5", "sha1", "sha256", "sha512", "sha3_256", "blake2b")):
    print(name, hashlib.new(name, data).hexdigest())
print(zlib.crc32(data), len(zlib.compress(data[:1000] * 50)))
print([f(0.7) for f in (math.sin, math.exp, math.lgamma, math.erf, math.atanh)])
print(decimal.Decimal(2).sqrt(), fractions.Fraction(1, 3) + fractions.Fraction(5, 7))
print(struct.pack("<dfq", math.pi, math.e, -3).hex(), json.dumps({"a": [1, 2.5, None]}))
print(pow(3, 100001, 10**40), math.factorial(200) % (10**30 + 57))
'"#,
    );
}

#[test]
fn python_threads_processes_signals() {
    same_on_debian(
        r#"python3 -c '
import threading, subprocess, signal, os, ctypes, time
total = []
def work(n): total.append(sum(i * i for i in range(n)))
threads = [threading.Thread(target=work, args=(5000 + i,)) for i in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
print(sorted(total))
print(subprocess.run(["sh", "-c", "cat; exit 3"], input=b"through a pipe", capture_output=True))
got = []
signal.signal(signal.SIGUSR1, lambda s, f: got.append(s))
os.kill(os.getpid(), signal.SIGUSR1)
signal.setitimer(signal.ITIMER_REAL, 0.05); signal.signal(signal.SIGALRM, lambda s, f: got.append(s))
while len(got) < 2: time.sleep(0.01)
print(got)
libc = ctypes.CDLL(None); libc.strtod.restype = ctypes.c_double
print(libc.strtod(b"1.25e-3", None), ctypes.sizeof(ctypes.c_longdouble))
pid = os.fork()
if pid == 0: os._exit(41)
print(os.waitpid(pid, 0)[1])
'"#,
    );
}

/// Runs modules (or `-k PATTERN`s of them) of Python's own test suite: number of tests, result, skips.
///
/// Some tests try every descriptor that could be open: the limit is set low.
const PYTHON_SUITE: &str = r#"ulimit -n 256
suite() {
    cd /tmp && python3 -m unittest -q "$@" > log 2>&1 < /dev/null
    echo "$? $* $(grep -aE '^(Ran|OK|FAILED)' log | sed -E 's/ in [0-9.]+s//' | tr '\n' ' ')"
    grep -aqE '^OK' log || tail -n 60 log >&2
}
"#;

#[test]
fn parts_of_pythons_own_suite() {
    let script = r#"suite test.test_struct
suite test.test_math -k Fma -k testF -k testL -k IsClose -k IntegerLog
suite ctypes.test.test_callbacks ctypes.test.test_structures ctypes.test.test_numbers ctypes.test.test_bitfields
suite test.test_signal -k WakeupSignal -k Pending -k PosixTests
suite test.test_threading -k ThreadTests.test_various -k ThreadTests.test_enumerate -k BarrierTests -k ConditionTests
suite test.test_subprocess -k POSIXProcessTestCase.test_preexec -k POSIXProcessTestCase.test_communicate -k POSIXProcessTestCase.test_std"#;
    same_on_debian(&format!("{PYTHON_SUITE}{script}"));
}

#[test]
fn dispatch_by_processor_model_finds_no_feature_that_is_not_there() {
    same_on_debian(
        r#"cd /tmp && cat > d.c <<'C'
#include <stdio.h>
__attribute__((noinline, target_clones("default", "avx2", "arch=haswell", "arch=skylake", "arch=skylake-avx512", "arch=sapphirerapids", "arch=znver2", "arch=znver3")))
double work(const unsigned *u, double *d, int n) { double s = 0; for (int i = 0; i < n; i++) { d[i] = u[i] * 3.0 + i; s += d[i]; } return s; }
int main(void) { static unsigned u[1000]; static double d[1000]; for (int i = 0; i < 1000; i++) u[i] = i * 4294967u; printf("%.17g\n", work(u, d, 1000)); return 0; }
C
gcc -O3 -o d d.c && ./d"#,
    );
}

#[test]
fn programs_of_32_bits() {
    same_on_debian(
        r#"cd /tmp && cat > t.c <<'C'
static int call(int n, int a, const void *b, int c) {
    int r; __asm__ volatile("int $0x80" : "=a"(r) : "a"(n), "b"(a), "c"(b), "d"(c) : "memory"); return r;
}
static unsigned long long x = 88172645463325252ull;
static char line[32] = "0000000000000000\n";
__attribute__((noinline)) static double series(int n) { double s = 0; while (n) { s += 1.0 / n / n; n--; } return s; }
void _start(void) {
    for (int i = 0; i < 100000; i++) { x ^= x << 13; x ^= x >> 7; x ^= x << 17; x += x / ((unsigned)i | 1) + x % 10007; }
    double s = series(1000); unsigned long long bits; __builtin_memcpy(&bits, &s, 8); x ^= bits;
    for (int i = 0; i < 16; i++) line[i] = "0123456789abcdef"[x >> (60 - 4 * i) & 15];
    call(4, 1, line, 17); call(1, (int)(x & 63), 0, 0);
}
__attribute__((used)) unsigned long long __udivmoddi4(unsigned long long n, unsigned long long d, unsigned long long *r) {
    unsigned long long q = 0, m = 0;
    for (int i = 63; i >= 0; i--) { m = m << 1 | (n >> i & 1); if (m >= d) { m -= d; q |= 1ull << i; } }
    if (r) *r = m;
    return q;
}
__attribute__((used)) unsigned long long __udivdi3(unsigned long long n, unsigned long long d) { return __udivmoddi4(n, d, 0); }
__attribute__((used)) unsigned long long __umoddi3(unsigned long long n, unsigned long long d) { unsigned long long r; __udivmoddi4(n, d, &r); return r; }
C
for o in "-O0" "-O2" "-O2 -msse2 -mfpmath=sse" "-O1 -mno-sse -mpush-args -maccumulate-outgoing-args"; do gcc -m32 -ffreestanding -nostdlib -static -fno-pic -no-pie -fno-stack-protector $o -o t t.c && { ./t; echo $?; }; done"#,
    );
}

#[test]
fn containers_in_the_guest() {
    // What Docker's check-config asks for, by use: nested namespaces, overlay, control groups, bridge and veth, netfilter.
    let script = r#"set -e
mkdir -p /mnt /tmp/o && mount -t tmpfs tmpfs /tmp/o && cd /tmp/o && mkdir l u w m && echo low > l/f
mount -t overlay overlay -o lowerdir=l,upperdir=u,workdir=w m && echo up >> m/f && cat m/f u/f && umount m
unshare -Urm sh -c 'id -u; mount -t tmpfs tmpfs /mnt && echo mounted'
unshare -mpuinf --mount-proc sh -c 'echo pid $$; id -u; hostname inner; hostname; echo /proc/[0-9]*'
unshare -n sh -c 'ip link add br0 type bridge && ip link add v0 type veth peer name v1 && ip link set v0 master br0 && ip link set br0 up && ip -o link | wc -l'
gunzip -c /proc/config.gz | grep -cE '^CONFIG_(NAMESPACES|NET_NS|PID_NS|IPC_NS|UTS_NS|CGROUPS|CGROUP_CPUACCT|CGROUP_DEVICE|CGROUP_FREEZER|CGROUP_SCHED|CPUSETS|MEMCG|KEYS|VETH|BRIDGE|BRIDGE_NETFILTER|IP_NF_FILTER|IP_NF_MANGLE|IP_NF_TARGET_MASQUERADE|IP6_NF_FILTER|IP6_NF_MANGLE|IP6_NF_TARGET_MASQUERADE|NETFILTER_XT_MATCH_ADDRTYPE|NETFILTER_XT_MATCH_CONNTRACK|NETFILTER_XT_MATCH_IPVS|NETFILTER_XT_MARK|IP_NF_RAW|IP_NF_NAT|NF_NAT|IP6_NF_RAW|IP6_NF_NAT|POSIX_MQUEUE|CGROUP_BPF|USER_NS|SECCOMP|SECCOMP_FILTER|CGROUP_PIDS|BLK_CGROUP|BLK_DEV_THROTTLING|CGROUP_PERF|CGROUP_HUGETLB|NET_CLS_CGROUP|CGROUP_NET_PRIO|CFS_BANDWIDTH|FAIR_GROUP_SCHED|IP_VS|IP_VS_NFCT|IP_VS_PROTO_TCP|IP_VS_PROTO_UDP|IP_VS_RR|EXT4_FS|EXT4_FS_POSIX_ACL|EXT4_FS_SECURITY|VXLAN|BRIDGE_VLAN_FILTERING|IPVLAN|MACVLAN|DUMMY|OVERLAY_FS)=y'"#;
    let run = World::shared()
        .mvm(&["run", "--rm", "--cap-add", "ALL", "busybox", "sh", "-c", script])
        .expect_code(0);
    assert_eq!(
        run.out(),
        "low\nup\nlow\nup\n0\nmounted\npid 1\n0\ninner\n/proc/1\n4\n59\n",
        "{}",
        run.err()
    );
}

#[test]
fn perl_and_awk() {
    same_on_debian(
        r#"perl -e 'my %h; for my $i (1..20000) { $h{$i % 997} += $i ** 1.5 } my $s = join ",", map { sprintf "%.3f", $h{$_} } sort { $a <=> $b } keys %h; use Digest::SHA qw(sha256_hex); print sha256_hex($s), "\n"; $_ = "aXbXc" x 1000; print s/X(\w)/uc $1/ger eq "" ? 0 : length, "\n"'
        gawk 'BEGIN { for (i = 1; i <= 50000; i++) { s += sin(i) * log(i); a[i % 101] = a[i % 101] i } printf "%.12g %d %s\n", s, length(a[7]), substr(a[5], 1, 30) }'"#,
    );
}

#[test]
fn sqlite() {
    same_on_debian(
        r#"sqlite3 /tmp/t.db "create table t(a integer primary key, b text, c real);
with recursive n(i) as (select 1 union all select i + 1 from n where i < 5000) insert into t select i, hex(i * 7919), i / 7.0 from n;
create index tb on t(b);
select count(*), sum(c), max(b), group_concat(a) from t where b between '1' and '12';
select b, avg(c) from t group by substr(b, 1, 2) order by 1 limit 5;
pragma integrity_check;""#,
    );
}

#[test]
fn openssl() {
    same_on_debian(
        r#"cd /tmp && yes mvm | head -c 3000000 > d
for h in md5 sha1 sha256 sha512 sha3-256 blake2b512 sm3; do openssl dgst -$h d; done
for c in aes-128-cbc aes-256-ctr aes-256-cbc camellia-256-cbc chacha20 aria-128-cbc; do openssl enc -$c -K 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f -iv 0f0e0d0c0b0a09080706050403020100 -in d 2>/dev/null | sha256sum; done
openssl genpkey -algorithm ed25519 -out k 2>/dev/null && openssl pkey -in k -pubout -out p && openssl pkeyutl -sign -inkey k -rawin -in d -out s && openssl pkeyutl -verify -pubin -inkey p -rawin -in d -sigfile s
openssl prime -hex FFFFFFFFFFFFFFC5; openssl kdf -keylen 32 -kdfopt digest:SHA256 -kdfopt pass:x -kdfopt salt:y -kdfopt iter:2000 PBKDF2"#,
    );
}

#[test]
fn compressors() {
    same_on_debian(
        r#"cd /tmp && for i in $(seq 1 400); do sha256sum /bin/sh; cat /etc/passwd; seq $i 97 40000; done > d; sha256sum d
for c in "gzip -n -6" "xz -2" "zstd -q -5"; do $c < d > c; sha256sum < c; ${c%% *} -dc < c | cmp - d && echo same; done"#,
    );
}

#[test]
fn git() {
    same_on_debian(
        r#"cd /tmp && export GIT_AUTHOR_DATE=@1700000000+0000 GIT_COMMITTER_DATE=@1700000000+0000 GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
git init -q -b main r && cd r && for i in $(seq 1 60); do echo "line $i" >> f; mkdir -p d$((i % 7)); echo $i > d$((i % 7))/f$i; git add . && git commit -qm "c $i"; done
git log --format=%H | sha256sum; git gc -q; git fsck; git diff HEAD~30 --stat | tail -1; git checkout -q -b x HEAD~10 && git merge -q main 2>&1; git rev-parse HEAD"#,
    );
}

#[test]
fn gcc_compiles_and_the_result_runs() {
    same_on_debian(
        r#"cd /tmp && cat > h.c <<'C'
#include <stdio.h>
#include <math.h>
#include <complex.h>
int main(void) {
    double _Complex z = 0; int n = 0;
    while (cabs(z) < 2 && n < 500) { z = z * z + (-0.74543 + 0.11301 * I); n++; }
    long double s = 0; for (int i = 1; i < 2000; i++) s += sinl(i) / i;
    printf("hello %d %.17g %.18Lf\n", n, cabs(z), s);
    return 0;
}
C
for o in "-O0" "-O2" "-O3 -march=x86-64-v3 -ffast-math -ftree-vectorize"; do gcc $o -o h h.c -lm && ./h; gcc $o -S -o - h.c | sha256sum; done"#,
    );
}

#[test]
fn musl_userland() {
    let world = World::shared();
    let tree = Chroot::new(&world.image_file("musl"));
    let script = "threads; seq 1 3000 | sort -rn | md5sum; echo $((7 * 6)) | tr 2 3";
    let native = tree.sh(script).expect_code(0);
    let guest = world.sh("musl", script).expect_code(0);
    assert_eq!(guest.out(), native.out());
    assert!(native.out().contains("thread 3"));
}
