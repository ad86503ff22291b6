//! Generates the message types of `proto/cri.proto` in pure Rust, no `protoc` needed.

fn main() {
    println!("cargo:rerun-if-changed=proto/cri.proto");
    protobuf_codegen::Codegen::new()
        .pure()
        .include("proto")
        .input("proto/cri.proto")
        .customize(protobuf_codegen::Customize::default().lite_runtime(true))
        .cargo_out_dir("proto")
        .run_from_script();
}
