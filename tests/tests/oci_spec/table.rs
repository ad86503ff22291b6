//! `docs/oci-spec.md` and these tests say the same.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

#[test]
fn the_table_and_the_tests_agree() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let document = fs::read_to_string(here.join("../docs/oci-spec.md")).expect("docs/oci-spec.md");
    let mut tests = BTreeSet::new();
    for entry in fs::read_dir(here.join("tests/oci_spec")).expect("the tests") {
        let text = fs::read_to_string(entry.expect("an entry").path()).expect("text");
        let lines: Vec<&str> = text.lines().collect();
        for pair in lines.windows(2).filter(|pair| pair[0] == "#[test]") {
            let name = pair[1].strip_prefix("fn ").and_then(|l| l.split('(').next());
            tests.insert(name.expect("a function behind #[test]").to_owned());
        }
    }
    let mut named = BTreeSet::new();
    for line in document.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [field, fate, test] = cells[..] else { panic!("not three cells: {line}") };
        let fates = ["holds", "ignored", "refused"];
        assert!(fates.iter().any(|f| fate.starts_with(f)), "{field}: what is {fate:?}?");
        let test = test.trim_matches('`');
        assert!(tests.contains(test), "{field}: there is no test {test:?}");
        named.insert(test.to_owned());
    }
    assert!(named.len() > 30, "the table was not found");
    tests.remove("the_table_and_the_tests_agree");
    let missing: Vec<_> = tests.difference(&named).collect();
    assert!(missing.is_empty(), "tests that the table does not name: {missing:?}");
}
