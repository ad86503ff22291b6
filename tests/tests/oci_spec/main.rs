//! The OCI runtime specification, field by field, as `docs/oci-spec.md` promises it. Each row of
//! that table names its test here; `the_table_and_the_tests_agree` sees to it.
//!
//! The tests share one machine and some look at all that is in it: one at a time (`--test-threads 1`).

mod cgroups;
mod hostile;
mod life;
mod linux;
mod machine;
mod mounts;
mod process;
mod seccomp;
mod table;
