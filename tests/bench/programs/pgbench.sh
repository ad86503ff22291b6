mkdir -p /run/postgresql
chown postgres /run/postgresql /tmp/work
bin=$(echo /usr/lib/postgresql/*/bin)
as() { setpriv --reuid postgres --regid postgres --clear-groups "$@"; }
as "$bin/initdb" -D pg -A trust >&2
as "$bin/pg_ctl" -D pg -l /tmp/work/pg.log -o '-c fsync=off -c autovacuum=off' -w -t 300 start >&2
as pgbench -i -s 1 -q >&2
begin
as pgbench -c 2 -t 600 --random-seed=1 >out
finish
grep -E 'number of (transactions actually|failed)' out
as psql -qAt -c 'select count(*), sum(delta) = (select sum(abalance) from pgbench_accounts) from pgbench_history'
as "$bin/pg_ctl" -D pg -m fast -w stop >&2
