cat >t.sql <<'Q'
PRAGMA journal_mode = wal;
CREATE TABLE t (id INTEGER PRIMARY KEY, k INTEGER, name TEXT, x REAL);
BEGIN;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)
INSERT INTO t SELECT i, (i * 7919) % 100003, printf('name %08x', (i * 2654435761) % 4294967296), i / 7.0 FROM n;
COMMIT;
CREATE INDEX tk ON t (k);
CREATE INDEX tn ON t (name);
SELECT count(*), sum(x), min(name), max(name) FROM t WHERE k BETWEEN 1000 AND 60000;
SELECT count(*) FROM t WHERE name LIKE '%77%';
SELECT k % 97 AS g, count(*), round(avg(x), 3) FROM t GROUP BY g ORDER BY 3 DESC LIMIT 5;
BEGIN;
UPDATE t SET x = x * 1.5, k = k + 1 WHERE id % 3 = 0;
DELETE FROM t WHERE id % 11 = 0;
COMMIT;
SELECT count(*), sum(a.x * b.id) FROM t a JOIN t b ON a.k = b.id WHERE b.name > 'name 8';
SELECT group_concat(name, '|') FROM (SELECT name FROM t ORDER BY x DESC LIMIT 3);
PRAGMA integrity_check;
Q
begin
sqlite3 t.db <t.sql
finish
