# Comes before each program: the way it tells the bench where the measured part begins and ends, and waits for its answer.
set -e
export HOME=/tmp LANG=C.UTF-8
mkdir -p /tmp/work
cd /tmp/work
exec 2>/tmp/stderr
trap 'code=$?; [ $code = 0 ] || { echo "exit $code"; tail -n 5 /tmp/stderr; }; echo "@end $code"' EXIT
mark() { echo "@$*"; read -r _; }
begin() { mark begin; }
# `finish N`: it was N times the work.
finish() { mark "finish ${1:-1}"; }
