//! Generates the message types of `proto/agent.proto` in pure Rust, no `protoc` needed.

fn main() {
    println!("cargo:rerun-if-changed=proto/agent.proto");
    protobuf_codegen::Codegen::new()
        .pure()
        .include("proto")
        .input("proto/agent.proto")
        // Reflection would add some hundred kilobytes to the guest's initramfs.
        .customize(protobuf_codegen::Customize::default().lite_runtime(true))
        .cargo_out_dir("proto")
        .run_from_script();
}
