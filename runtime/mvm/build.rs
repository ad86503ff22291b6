//! Puts the guest's kernel, its module and the initramfs into the executable, if the environment names them.

use std::path::PathBuf;
use std::{env, fs};

fn main() {
    let mut source = String::new();
    for (constant, variable) in [
        ("KERNEL", "MVM_GUEST_KERNEL"),
        ("XFS", "MVM_GUEST_XFS"),
        ("INITRAMFS", "MVM_GUEST_INITRAMFS"),
    ] {
        println!("cargo:rerun-if-env-changed={variable}");
        source.push_str(&entry(constant, variable));
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    fs::write(out.join("embedded.rs"), source).expect("cannot write embedded.rs");
}

fn entry(constant: &str, variable: &str) -> String {
    let Some(path) = env::var_os(variable).filter(|v| !v.is_empty()).map(PathBuf::from) else {
        return format!("const {constant}: Option<&[u8]> = None;\n");
    };
    assert!(path.is_absolute(), "{variable} must be an absolute path, not {}", path.display());
    let size =
        fs::metadata(&path).unwrap_or_else(|e| panic!("{variable}: {}: {e}", path.display())).len();
    println!("cargo:rerun-if-changed={}", path.display());
    if size == 0 && constant == "XFS" {
        // This kernel has no such module.
        return format!("const {constant}: Option<&[u8]> = None;\n");
    }
    format!(
        "static {constant}_BYTES: Aligned<[u8; {size}]> = Aligned(*include_bytes!({path:?}));\n\
         const {constant}: Option<&[u8]> = Some(&{constant}_BYTES.0);\n"
    )
}
