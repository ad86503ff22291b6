//! `make test-full`: larger programs, whole test suites, and hours of load in small.

use std::sync::OnceLock;
use std::time::Duration;

use mvm_tests::{Chroot, World, run_with};

/// Whole test suites take their time on an interpreter.
const PATIENCE: Duration = Duration::from_secs(3600);

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let world = World::new();
        let file = world.image_file("debian-full");
        world.mvm(&["image", "import", file.to_str().expect("a UTF-8 path")]).expect_code(0);
        world
    })
}

/// Runs `script` in a container of two vCPUs and in a chroot of the same image, and compares.
#[track_caller]
fn same(script: &str) {
    static TREE: OnceLock<Chroot> = OnceLock::new();
    let tree = TREE.get_or_init(|| Chroot::new(&world().image_file("debian-full")));
    let native = tree.sh(script).expect_code(0);
    let guest = guest(script);
    assert_eq!(guest, native.out());
    assert!(!native.stdout.is_empty(), "a comparison of nothing");
}

/// What `script` prints in a container of two vCPUs.
#[track_caller]
fn guest(script: &str) -> String {
    let args = ["run", "--rm", "--cpus", "2", "--memory", "2g", "-e", "HOME=/root"];
    let command = ["debian:full", "sh", "-c", script];
    let command = world().command(&[&args[..], &command[..]].concat());
    run_with(command, b"", PATIENCE).expect_code(0).out()
}

#[test]
#[ignore = "make test-full"]
fn nodejs() {
    same(
        r#"cd /tmp && cat > t.js <<'JS'
const crypto = require('crypto'), zlib = require('zlib'), { Worker, isMainThread, parentPort } = require('worker_threads');
if (!isMainThread) { let s = 0; for (let i = 0; i < 3e6; i++) s = (s * 31 + i) | 0; parentPort.postMessage(s); } else {
  let s = 0; for (let i = 0; i < 5e6; i++) s = (s * 1103515245 + 12345) % 2147483648;
  console.log(s);
  const o = {}; for (let i = 0; i < 50000; i++) o['k' + (i % 1000)] = (o['k' + (i % 1000)] || 0) + i; console.log(Object.keys(o).length, o.k7);
  const b = Buffer.alloc(1 << 20, 'mvm '); console.log(crypto.createHash('sha512').update(b).digest('hex').slice(0, 32), zlib.gunzipSync(zlib.gzipSync(b)).equals(b));
  console.log([..."z\u00e9\u{1f600}x"].sort(), /(\d+)-(?<n>\w+)/u.exec('12-ab').groups.n, (2n ** 200n % 1000007n).toString(), Math.sin(1e6).toFixed(15));
  const a = Array.from({ length: 100000 }, (_, i) => (i * 7919) % 100003); a.sort((x, y) => x - y); console.log(a[500], a.reduce((x, y) => x + y));
  let done = 0; for (let i = 0; i < 2; i++) new Worker(__filename).on('message', m => { console.log('worker', m); if (++done == 2) setTimeout(() => console.log('end'), 5); });
}
JS
node t.js"#,
    );
}

#[test]
#[ignore = "make test-full"]
fn go() {
    same(
        r#"mkdir -p /tmp/g && cd /tmp/g && export GOCACHE=/tmp/gc GOFLAGS=-mod=mod && cat > main.go <<'GO'
package main

import (
	"crypto/sha256"
	"fmt"
	"runtime"
	"sort"
	"sync"
	"time"
)

func main() {
	var wg sync.WaitGroup
	out := make([]string, 8)
	for i := range out {
		wg.Add(1)
		go func(i int) {
			defer wg.Done()
			h := sha256.Sum256([]byte{byte(i)})
			for k := 0; k < 20000; k++ {
				h = sha256.Sum256(h[:])
			}
			out[i] = fmt.Sprintf("%x", h[:6])
		}(i)
	}
	wg.Wait()
	fmt.Println(out)
	c := make(chan int)
	go func() { for i := 0; i < 20000; i++ { c <- i }; close(c) }()
	s := 0
	for v := range c { s += v }
	m := map[string]float64{}
	for i := 0; i < 20000; i++ { m[fmt.Sprint(i%500)] += float64(i) / 3 }
	keys := make([]string, 0)
	for k := range m { keys = append(keys, k) }
	sort.Strings(keys)
	fmt.Println(s, len(keys), m["77"])
	for i := 0; i < 20; i++ { runtime.GC(); _ = make([]byte, 1<<20) }
	select { case <-time.After(20 * time.Millisecond): fmt.Println("timer") }
	defer func() { fmt.Println("recovered", recover()) }()
	var p *int
	fmt.Println(*p)
}
GO
go run main.go"#,
    );
}

#[test]
#[ignore = "make test-full"]
fn java() {
    same(
        r#"cd /tmp && cat > T.java <<'J'
import java.util.*; import java.util.concurrent.*; import java.util.stream.*; import java.security.*;
public class T { public static void main(String[] a) throws Exception {
  var pool = Executors.newFixedThreadPool(4); var fs = new ArrayList<Future<Long>>();
  for (int t = 0; t < 8; t++) { final int n = t; fs.add(pool.submit(() -> { long s = n; for (int i = 0; i < 3_000_000; i++) s = s * 6364136223846793005L + 1442695040888963407L; return s; })); }
  for (var f : fs) System.out.println(f.get()); pool.shutdown();
  System.out.println(IntStream.range(0, 200000).boxed().collect(Collectors.groupingBy(i -> i % 97, TreeMap::new, Collectors.summingLong(i -> i))).get(13));
  var md = MessageDigest.getInstance("SHA-256"); for (int i = 0; i < 200; i++) md.update(new byte[10000]); System.out.println(HexFormat.of().formatHex(md.digest()));
  double d = 0; for (int i = 1; i < 500000; i++) d += Math.sin(i) / Math.sqrt(i); System.out.println(d);
  try { Object o = null; o.hashCode(); } catch (NullPointerException e) { System.out.println("npe"); }
  var l = new ArrayList<byte[]>(); for (int i = 0; i < 200; i++) { l.add(new byte[100000]); if (i % 50 == 0) System.gc(); } System.out.println(l.size());
} }
J
javac T.java 2>&1 && java -Xmx256m T"#,
    );
}

#[test]
#[ignore = "make test-full"]
fn postgresql() {
    let out = guest(
        r#"set -e; mkdir -p /run/postgresql && chown postgres /run/postgresql && P=$(ls -d /usr/lib/postgresql/*/bin) && cd /tmp
as() { setpriv --reuid postgres --regid postgres --clear-groups "$@"; }
as $P/initdb -D /tmp/pg -A trust > /tmp/log 2>&1 || { cat /tmp/log >&2; exit 1; }
as $P/pg_ctl -D /tmp/pg -l /tmp/pg.log -o '-c fsync=off' -w -t 200 start > /dev/null
as psql -qAt -c "create table t as select i, md5(i::text) m from generate_series(1, 20000) i; create index on t(m); select count(*), min(m), sum(i) from t where m like 'a%'"
as pgbench -i -s 1 -q > /dev/null 2>&1; as pgbench -c 2 -t 50 2>/dev/null | grep -E 'number of transactions (actually|failed)'
as $P/pg_ctl -D /tmp/pg -m fast -w stop > /dev/null; echo stopped"#,
    );
    // Counted with Python's hashlib.
    assert!(out.starts_with("1284|a0046ad4c1bafc4ef04e41e755f28368|12894204\n"), "{out}");
    assert!(out.contains("100/100") && out.ends_with("stopped\n"), "{out}");
}

#[test]
#[ignore = "make test-full"]
fn redis() {
    let out = guest(
        r#"set -e; redis-server --port 6379 --daemonize yes --save '' --dir /tmp > /dev/null
until redis-cli ping 2>/dev/null | grep -q PONG; do sleep 0.1; done
redis-benchmark -n 2000 -q -t set,get,incr,lpush,hset 2>/dev/null | tr '\r' '\n' | grep -c 'requests per second'
redis-cli eval 'local s = 0 for i = 1, 10000 do s = s + i % 7 end return s' 0; redis-cli incr counter:__rand_int__; redis-cli shutdown nosave || true; echo down"#,
    );
    assert_eq!(out.lines().last(), Some("down"), "{out}");
    assert_eq!(out.lines().next(), Some("5"), "{out}");
    assert!(out.contains("29998"), "{out}");
}

#[test]
#[ignore = "make test-full"]
fn modules_of_pythons_own_suite() {
    let modules = "test_math test_struct test_ctypes test_threading test_subprocess test_signal test_zlib \
                   test_hashlib test_mmap test_float test_long";
    let commands = modules.split_whitespace().map(|m| format!("-m unittest -q test.{m}"));
    // Its cases get the library that they test from its own main.
    for command in commands.chain(["-m test.test_decimal".into()]) {
        // Natively some of them fail on a busy host, for want of time.
        let out = guest(&format!(
            r#"cd /tmp; ulimit -n 256; python3 {command} > log 2>&1 < /dev/null
echo "$? $(grep -aE '^(Ran|OK|FAILED)' log | sed -E 's/ in [0-9.]+s//' | tr '\n' ' ')"
grep -aqE '^OK' log || tail -n 40 log >&2"#
        ));
        assert!(out.starts_with("0 Ran ") && out.contains(" OK"), "{command}: {out}");
    }
}

#[test]
#[ignore = "make test-full"]
fn stress() {
    // Half an hour in all. What --verify checks itself; the kernel's own complaints count as well.
    for class in ["cpu", "vm", "fork", "switch", "futex", "signal", "mmap"] {
        let out = guest(&format!(
            "stress-ng --{class} 2 --verify --timeout 260 --metrics-brief > /tmp/log 2>&1; echo code $?; \
             grep -E 'fail|error' /tmp/log; dmesg | grep -iE 'warn|bug:|stall|lockup|unstable|segfault|general protection' ; true"
        ));
        assert_eq!(out, "code 0\n", "stress-ng --{class}");
    }
}
