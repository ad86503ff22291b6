redis-server --port 6379 --daemonize yes --save '' --dir /tmp >/dev/null
until redis-cli ping | grep -q PONG; do sleep 0.1; done
begin
redis-benchmark -n 6000 -q -t set,get,incr,lpush,hset >out
finish
tr '\r' '\n' <out | grep -c 'requests per second'
redis-cli --raw get counter:__rand_int__
redis-cli --raw llen mylist
redis-cli shutdown nosave || true
