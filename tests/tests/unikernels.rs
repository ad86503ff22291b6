//! Unikernels: kernels made by hand, as bare files and in images of every packaging.

use std::fs;

use mvm_tests::recipe::{Recipe, image};
use mvm_tests::{Finished, World, engine};
use mvm_vmm::testing::ElfBuilder;
use serde_json::json;

/// Prints its command line and a line break, and writes 21 to the debug exit port: exit code 43. It is
/// entered as Linux is, with RSI at the boot parameters.
const PRINTS: &[u8] = &[
    0x8b, 0xb6, 0x28, 0x02, 0, 0, // mov esi, [rsi + 0x228]
    0xba, 0xf8, 0x03, 0, 0, // mov edx, 0x3f8
    0xac, 0x84, 0xc0, 0x74, 0x03, // lodsb; test al, al; jz +3
    0xee, 0xeb, 0xf8, // out dx, al; jmp -8
    0xb0, 0x0a, 0xee, // mov al, 10; out dx, al
    0xb8, 21, 0, 0, 0, 0xe7, 0xf4, // mov eax, 21; out 0xf4, eax
    0xfa, 0xf4, 0xeb, 0xfd, // cli; hlt; jmp -3
];
const PRINTED: i32 = 43;

/// Prints every byte that there is and ends with exit code 1.
const ALL_BYTES: &[u8] = &[
    0xba, 0xf8, 0x03, 0, 0, 0x31, 0xc0, // mov edx, 0x3f8; xor eax, eax
    0xee, 0xfe, 0xc0, 0x75, 0xfb, // out dx, al; inc al; jnz -5
    0x31, 0xc0, 0xe7, 0xf4, 0xfa, 0xf4, 0xeb, 0xfd, // xor eax, eax; out 0xf4, eax; stop
];

/// An instruction that there is not, and nobody to take the exception.
const CRASHES: &[u8] = &[0x0f, 0x0b];

/// An ELF file that is loaded at 1 MiB and begins with its first byte.
fn elf(code: &[u8]) -> Vec<u8> {
    const AT: u64 = 0x10_0000;
    ElfBuilder::elf64(AT).segment(AT, AT, code, 0x1000).build()
}

fn kernel(world: &World, name: &str, code: &[u8]) -> String {
    let path = world.root().join(name);
    fs::write(&path, elf(code)).unwrap();
    path.to_str().unwrap().to_owned()
}

fn bare(world: &World, kind: &str, kernel: &str, more: &[&str]) -> Finished {
    let mut line =
        vec!["run", "--engine", engine(), "--rm", "--unikernel", kind, "--kernel", kernel];
    line.extend(more);
    world.mvm(&line)
}

/// Runs an image's unikernel, which prints its command line.
#[track_caller]
fn prints(world: &World, image: &str, args: &[&str]) -> String {
    let mut line = vec!["run", "--engine", engine(), "--rm", image];
    line.extend(args);
    without_devices(&world.mvm(&line).expect_code(PRINTED).out())
}

/// A command line without the words that tell where the devices are.
fn without_devices(line: &str) -> String {
    let words = line.trim_end_matches('\n').split(' ');
    let words: Vec<&str> = words.filter(|w| !w.starts_with("virtio_mmio.device=")).collect();
    words.join(" ")
}

/// One line on standard error with every word of `words`, exit code 125, nothing left.
#[track_caller]
fn fails(world: &World, args: &[&str], words: &[&str]) {
    let run = world.mvm(&[&["run", "--engine", engine()], args].concat()).expect_code(125);
    assert_eq!(run.err().lines().count(), 1, "not one line: {}", run.err());
    for word in words {
        assert!(run.err().contains(word), "no {word:?} in: {}", run.err());
    }
    assert_eq!(run.out(), "");
    assert_eq!(world.mvm(&["ps", "-aq"]).out(), "");
}

#[test]
fn a_bare_file_takes_arguments_and_gives_its_exit_code() {
    let world = World::new();
    let kernel = kernel(&world, "kernel", PRINTS);
    let run = |kind: &str, more: &[&str]| {
        without_devices(&bare(&world, kind, &kernel, more).expect_code(PRINTED).out())
    };
    assert_eq!(run("rust", &["--", "--one", "t w o"]), "--one \"t w o\"");
    assert_eq!(run("rust", &[]), "");
    assert_eq!(run("hermit", &["--cmdline", "-v", "a"]), "-v -- a");
    assert_eq!(run("unikraft", &["-e", "A=b c", "x"]), "kernel env.vars=[ \"A=b c\" ] -- x");
    assert_eq!(run("rust", &["--memory", "4m", "--boot", "linux", "y"]), "y");
    assert_eq!(world.mvm(&["ps", "-aq"]).out(), "");
}

#[test]
fn output_is_byte_exact_and_kept_for_logs() {
    let world = World::new();
    let kernel = kernel(&world, "kernel", ALL_BYTES);
    let line = [
        "run",
        "--engine",
        engine(),
        "--name",
        "bytes",
        "--unikernel",
        "rust",
        "--kernel",
        &kernel,
    ];
    let all: Vec<u8> = (0..=255).collect();
    assert_eq!(world.mvm(&line).expect_code(1).stdout, all);
    assert_eq!(world.mvm(&["logs", "bytes"]).expect_code(0).stdout, all);
    assert!(world.mvm(&["ps", "-a"]).out().contains("Exited (1)"));
    world.mvm(&["rm", "bytes"]).expect_code(0);
}

#[test]
fn a_crash_is_told_and_has_its_code() {
    let world = World::new();
    let kernel = kernel(&world, "kernel", CRASHES);
    let run = bare(&world, "rust", &kernel, &[]).expect_code(139);
    assert!(run.err().contains("the guest crashed"), "{}", run.err());
}

#[test]
fn files_that_are_no_kernels_are_refused_in_one_line() {
    let world = World::new();
    let path = |name: &str, bytes: &[u8]| {
        let path = world.root().join(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let whole = elf(PRINTS);
    let missing = world.root().join("missing").to_str().unwrap().to_owned();
    for (file, word) in [
        (path("half", &whole[..whole.len() - 8]), "kernel"),
        (path("header", &whole[..40]), "kernel"),
        (path("text", b"hello there"), "kernel"),
        (path("empty", b""), "empty"),
        (missing, "cannot open"),
    ] {
        let line = ["--unikernel", "rust", "--kernel", &file];
        fails(&world, &line, &[word]);
    }
}

#[test]
fn images_for_urunc_run_by_labels_and_by_their_file() {
    let world = World::new();
    let kernel = elf(PRINTS);
    let keys = |kind: &str, path: &str, words: &str| {
        json!({
            "com.urunc.unikernel.unikernelType": kind,
            "com.urunc.unikernel.hypervisor": "qemu",
            "com.urunc.unikernel.binary": path,
            "com.urunc.unikernel.cmdline": words,
        })
    };
    let labels = Recipe {
        config: json!({"Labels": keys("unikraft", "/unikernel/app", "serve -p 80"), "Env": ["A=b"]}),
        files: &[("/unikernel/app", &kernel)],
        ..Recipe::default()
    };
    let labels = image(&world, "labels", &labels);
    assert_eq!(prints(&world, &labels, &[]), "app env.vars=[ \"A=b\" ] -- serve -p 80");
    assert_eq!(prints(&world, &labels, &["other"]), "app env.vars=[ \"A=b\" ] -- other");
    let command = Recipe {
        config: json!({
            "Labels": keys("hermit", "/kernel", "not these"),
            "Entrypoint": ["serve"],
            "Cmd": ["-p", "80"],
        }),
        files: &[("/kernel", &kernel)],
        ..Recipe::default()
    };
    let command = image(&world, "command", &command);
    assert_eq!(prints(&world, &command, &[]), "-- serve -p 80");
    assert_eq!(prints(&world, &command, &["-v"]), "-- serve -v");

    // "hermit", "qemu", "/unikernel/app", "serve".
    let json = keys("aGVybWl0", "L3VuaWtlcm5lbC9hcHA=", "c2VydmU=").to_string();
    let json = json.replace("\"qemu\"", "\"cWVtdQ==\"");
    let file = Recipe {
        files: &[("/unikernel/app", &kernel), ("/urunc.json", json.as_bytes())],
        ..Recipe::default()
    };
    assert_eq!(prints(&world, &image(&world, "file", &file), &[]), "-- serve");

    let index = Recipe {
        descriptor: keys("hermit", "/kernel", "from the index"),
        files: &[("/kernel", &kernel)],
        ..Recipe::default()
    };
    assert_eq!(prints(&world, &image(&world, "index", &index), &[]), "-- from the index");
}

#[test]
fn images_of_kraft_and_hermit_run() {
    let world = World::new();
    let kernel = elf(PRINTS);
    let kraft = Recipe {
        os: "fc",
        architecture: "x86_64",
        config: json!({"Cmd": ["/server", "-v"]}),
        layer: json!({"org.unikraft.kernel.image": "/unikraft/bin/kernel"}),
        files: &[("/unikraft/bin/kernel", &kernel), ("/unikraft/bin/initrd", b"070701")],
        ..Recipe::default()
    };
    let kraft = image(&world, "kraft", &kraft);
    let line = "kernel vfs.fstab=[ \"initrd0:/:extract:::\" ] -- /server -v";
    assert_eq!(prints(&world, &kraft, &[]), line);

    let mut application = elf(CRASHES);
    application[7] = 255;
    let hermit = Recipe {
        config: json!({"Entrypoint": ["/app/httpd"], "Cmd": ["-p", "80"]}),
        files: &[("/app/httpd", &application), ("/app/hermit-loader", &kernel)],
        ..Recipe::default()
    };
    assert_eq!(prints(&world, &image(&world, "hermit", &hermit), &[]), "-- -p 80");
}

#[test]
fn what_only_linux_could_do_is_refused_for_images_too() {
    let world = World::new();
    let kernel = elf(PRINTS);
    let config = json!({"Labels": {
        "com.urunc.unikernel.unikernelType": "hermit",
        "com.urunc.unikernel.binary": "/kernel",
    }});
    let recipe = Recipe { config, files: &[("/kernel", &kernel)], ..Recipe::default() };
    let image = image(&world, "image", &recipe);
    for flag in ["--init", "--user=1", "--tmpfs=/x", "--cap-add=ALL", "--env=A=b"] {
        fails(&world, &[flag, &image], &[flag.split('=').next().unwrap(), "cannot hold"]);
    }
    fails(&world, &["--memory", "2m", &image], &["--memory 2m"]);
    fails(&world, &["--kernel", "/etc/passwd", &image], &["--kernel"]);
    let line = ["run", "--engine", engine(), "-m", "4m", "--name", "tiny", &image, "x"];
    world.mvm(&line).expect_code(PRINTED);
    let about = world.inspect("tiny");
    assert_eq!(about["memory"], 4 << 20);
    assert_eq!(about["command"], json!(["x"]));
    world.mvm(&["rm", "tiny"]).expect_code(0);
}

#[test]
fn images_whose_kernels_cannot_be_used_are_refused_in_one_line() {
    let world = World::new();
    let labels = |path: &str| {
        let kind = ("com.urunc.unikernel.unikernelType", "hermit");
        json!({"Labels": {kind.0: kind.1, "com.urunc.unikernel.binary": path}})
    };
    let refused = |name: &str, recipe: &Recipe<'_>, words: &[&str]| {
        let image = image(&world, name, recipe);
        fails(&world, &[&image], words);
    };
    let recipe = |path: &str| Recipe { config: labels(path), ..Recipe::default() };
    refused("missing", &recipe("/kernel"), &["/kernel", "does not exist"]);
    refused("up", &recipe("../../etc/passwd"), &["unikernel.binary", "out of the image"]);
    // A file of the host's that a link must not reach.
    let outside = world.root().join("outside");
    fs::write(&outside, elf(PRINTS)).unwrap();
    let target = format!("../../../../../../..{}", outside.display());
    let link = Recipe { link: Some(("/kernel", &target)), ..recipe("/kernel") };
    refused("link", &link, &["/kernel", "does not exist"]);
    let whole = elf(PRINTS);
    let half = Recipe { files: &[("/kernel", &whole[..100])], ..recipe("/kernel") };
    refused("half", &half, &["kernel"]);
    let directory = Recipe { files: &[("/kernel/x", b"")], ..recipe("/kernel") };
    refused("directory", &directory, &["/kernel", "not a regular file"]);
    let unknown = json!({"Labels": {"com.urunc.unikernel.unikernelType": "plan9"}});
    let unknown = Recipe { config: unknown, ..Recipe::default() };
    refused("unknown", &unknown, &["unikernelType", "plan9"]);
    let krun = Recipe { config: json!({"Labels": {"krun.cpus": "many"}}), ..Recipe::default() };
    refused("krun", &krun, &["krun.cpus", "many"]);
}
