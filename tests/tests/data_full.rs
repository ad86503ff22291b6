//! `make test-full`: data that outlives what happens to machines, and much of it.

use std::time::Duration;

use mvm_tests::{Shim, World, eventually, run_with};

/// Databases and gibibytes take their time on an emulated processor.
const PATIENCE: Duration = Duration::from_secs(3600);

/// What the server is started with: as it comes, with everything written before it is said to be.
const SERVER: &str = r#"set -e
mkdir -p /run/postgresql && chown postgres /run/postgresql; P=$(ls -d /usr/lib/postgresql/*/bin); cd /tmp
as() { setpriv --reuid postgres --regid postgres --clear-groups "$@"; }
start() { as $P/pg_ctl -D /data/pg -l /tmp/pg.log -w -t 600 start >/dev/null || { cat /tmp/pg.log >&2; exit 1; }; }
sql() { as psql -h /run/postgresql -qAt -c "$1" postgres; }
"#;

#[test]
#[ignore = "make test-full"]
fn a_database_on_a_volume_survives_the_loss_of_its_machine() {
    let world = World::new();
    let file = world.image_file("debian-full");
    world.mvm(&["image", "import", file.to_str().expect("a UTF-8 path")]).expect_code(0);
    let dir = tempfile::tempdir().expect("a directory");
    let volume = format!("{}:/data", dir.path().display());
    // Each number is said when its row is safe, and not before.
    let script = format!(
        "{SERVER}mkdir /data/pg && chown postgres /data/pg
         as $P/initdb -D /data/pg -A trust --data-checksums >/tmp/log 2>&1 || {{ cat /tmp/log >&2; exit 1; }}
         start; sql 'create table t (i int primary key, m text); create index on t (m)'
         n=0; while :; do n=$((n + 1)); sql \"insert into t values ($n, repeat(md5('$n'), 20))\"; echo safe $n; done"
    );
    let flags = ["run", "-d", "--name", "db", "--memory", "1g", "-v", &volume, "debian:full"];
    world.mvm(&[&flags[..], &["sh", "-c", &script]].concat()).expect_code(0);
    let safe = || {
        let said = world.mvm(&["logs", "db"]).out();
        let numbers = said.lines().filter_map(|line| line.strip_prefix("safe ")?.parse().ok());
        numbers.max().unwrap_or(0_u64)
    };
    for round in 1..=3 {
        eventually("rows in the table", || {
            assert_eq!(world.mvm(&["logs", "db"]).expect_code(0).err(), "");
            safe() >= 20 * round
        });
    }
    world.kill_monitor("db");
    eventually("the end of the container", || {
        world.mvm(&["ps", "-q"]).expect_code(0).out().is_empty()
    });
    let safe = safe();
    let script = format!(
        "{SERVER}rm -f /data/pg/postmaster.pid; start
         sql 'select count(*), min(i), max(i), bool_and(m = repeat(md5(i::text), 20)) from t'
         sql 'reindex table t; insert into t values (0, 0)'
         as $P/pg_ctl -D /data/pg -m fast -w stop >/dev/null
         as $P/pg_checksums --check -D /data/pg | grep 'Bad checksums'"
    );
    let again =
        ["run", "--rm", "--memory", "1g", "-v", &volume, "debian:full", "sh", "-c", &script];
    let said = run_with(world.command(&again), b"", PATIENCE).expect_code(0).out();
    let mut lines = said.lines();
    let row: Vec<&str> = lines.next().unwrap_or_default().split('|').collect();
    let count: u64 = row[0].parse().expect("a number");
    // One more may have been safe without anybody having heard.
    assert!((safe..=safe + 1).contains(&count), "{safe} rows were safe: {said}");
    assert_eq!(row[1..], ["1", &count.to_string(), "t"], "{said}");
    assert!(lines.next().is_some_and(|line| line.ends_with(" 0")), "{said}");
}

#[test]
#[ignore = "a gibibyte"]
fn a_gibibyte_on_a_disk_comes_through_whole() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: the shim mounts, and this is an ordinary user");
        return;
    }
    let shim = Shim::new();
    mvm_tests::data_on_a_disk(&shim, 1024);
    shim.expect_nothing_left();
}
