#!/usr/bin/env bash
# step.sh NAME COMMAND...: runs one step of a build, says what is done and how long it took.
set -u
cd "$(dirname "$0")/.." || exit 1
. scripts/lib.sh
name=$1
shift
say "==> $name"
start=$SECONDS
"$@"
code=$?
if [ $code -eq 0 ]; then
    say "<== $name: $(human $((SECONDS - start)))"
else
    say "<== $name: FAILED (exit code $code) after $(human $((SECONDS - start)))"
fi
exit $code
