//! Whether the end-to-end tests can run on the kvm engine here: `kvm-host DOCTOR`, with the output of `mvm doctor --json`
//! in file `DOCTOR` (`-`: standard input). Says why not, and what to do, in the doctor's words, and exits with 1 then.

use std::io::{Read, Write};
use std::process::ExitCode;
use std::{env, fs, io};

use serde_json::Value;

fn main() -> ExitCode {
    match report().map(|report| verdict(&report)) {
        Ok(Ok(found)) => {
            let told = writeln!(io::stdout(), "the kvm engine can be tested here: {found}");
            if told.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(2) }
        }
        Ok(Err(why)) => {
            let _ = writeln!(io::stderr(), "the kvm engine cannot be tested here: {why}");
            ExitCode::FAILURE
        }
        Err(e) => {
            let _ = writeln!(io::stderr(), "kvm-host: {e}");
            ExitCode::from(2)
        }
    }
}

fn report() -> Result<Value, Box<dyn std::error::Error>> {
    let file = env::args().nth(1).ok_or("usage: kvm-host DOCTOR")?;
    let mut text = String::new();
    match &*file {
        "-" => io::stdin().read_to_string(&mut text).map(drop),
        _ => fs::read_to_string(&file).map(|content| text = content),
    }
    .map_err(|e| format!("{file}: {e}"))?;
    serde_json::from_str(&text)
        .map_err(|e| format!("{file} is not what `mvm doctor --json` says: {e}").into())
}

/// What was found, or why a Linux guest would not run on hardware.
fn verdict(report: &Value) -> Result<String, String> {
    let kvm = &report["kvm"];
    let word = |name: &str| kvm["finding"][name].as_str().unwrap_or("nothing").to_owned();
    if kvm["verdict"] == "usable" {
        return Ok(word("text"));
    }
    let (kind, text, detail, remedy) = (word("kind"), word("text"), word("detail"), word("remedy"));
    Err(format!("{text} ({kind})\n  {detail}\n  what to do: {remedy}"))
}
