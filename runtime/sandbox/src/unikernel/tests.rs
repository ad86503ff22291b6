use super::*;

/// An image that is described.
#[derive(Default)]
struct Image {
    annotations: Pairs,
    manifest: Pairs,
    layer: Pairs,
    labels: Pairs,
    env: Vec<String>,
    entrypoint: Vec<String>,
    cmd: Vec<String>,
    args: Vec<String>,
    disks: Vec<Option<MountPoint>>,
    unikernel_platform: bool,
    files: BTreeMap<String, Vec<u8>>,
}

impl Tree for BTreeMap<String, Vec<u8>> {
    fn head(&self, path: &str, limit: usize) -> Result<Option<Vec<u8>>, Error> {
        Ok(self.get(path).map(|bytes| bytes[..limit.min(bytes.len())].to_vec()))
    }
}

fn pairs(list: &[(&str, &str)]) -> Pairs {
    list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn urunc(list: &[(&str, &str)]) -> Pairs {
    list.iter().map(|(k, v)| (format!("com.urunc.unikernel.{k}"), (*v).to_owned())).collect()
}

fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|w| (*w).to_owned()).collect()
}

impl Image {
    fn recognise(&self) -> Result<Recognised, Error> {
        recognise(&Packaging {
            annotations: &self.annotations,
            manifest: &self.manifest,
            layers: &[&Pairs::new(), &self.layer],
            labels: &self.labels,
            env: &self.env,
            entrypoint: &self.entrypoint,
            cmd: &self.cmd,
            args: &self.args,
            kernel_args: "",
            disks: &self.disks,
            unikernel_platform: self.unikernel_platform,
            tree: &self.files,
        })
    }

    #[track_caller]
    fn plan(&self) -> UnikernelPlan {
        match self.recognise() {
            Ok(Recognised::Unikernel(plan)) => plan,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn refused(&self) -> String {
        self.recognise().unwrap_err().to_string()
    }
}

#[test]
fn ordinary_images_are_linux() {
    let image = Image {
        labels: pairs(&[("maintainer", "x"), ("com.urunc.other", "y")]),
        entrypoint: words(&["/bin/sh"]),
        files: [("/bin/sh".to_owned(), b"\x7fELF\x02\x01\x01\0".to_vec())].into(),
        ..Image::default()
    };
    assert_eq!(image.recognise(), Ok(Recognised::Linux(Size::default())));
    assert_eq!(Image::default().recognise(), Ok(Recognised::Linux(Size::default())));
}

#[test]
fn urunc_labels_plain_and_base64_mean_the_same() {
    let plain = [
        ("unikernelType", "unikraft"),
        ("hypervisor", "qemu"),
        ("binary", "/unikernel/app"),
        ("cmdline", "nginx -c /etc/nginx.conf"),
        ("initrd", "unikernel/initrd"),
        ("surprise", "\0"),
    ];
    let base64 = [
        ("unikernelType", "dW5pa3JhZnQ="),
        ("hypervisor", "cWVtdQ=="),
        ("binary", "L3VuaWtlcm5lbC9hcHA="),
        ("cmdline", "bmdpbnggLWMgL2V0Yy9uZ2lueC5jb25m"),
        ("initrd", "dW5pa2VybmVsL2luaXRyZA=="),
    ];
    let of_labels = |labels| Image { labels, ..Image::default() }.plan();
    let plan = of_labels(urunc(&plain));
    assert_eq!(plan, of_labels(urunc(&base64)));
    let json = serde_json::to_vec(&urunc(&base64)).unwrap();
    let files = [("/urunc.json".to_owned(), json)].into();
    assert_eq!(plan, Image { files, ..Image::default() }.plan());
    assert_eq!((plan.kind(), &*plan.kernel), (Kind::Unikraft, "/unikernel/app"));
    assert_eq!(plan.initrd.as_deref(), Some("/unikernel/initrd"));
    assert_eq!(
        plan.cmdline,
        "app vfs.fstab=[ \"initrd0:/:extract:::\" ] -- nginx -c /etc/nginx.conf"
    );
}

#[test]
fn users_annotations_and_arguments_win() {
    let mut image = Image {
        labels: urunc(&[
            ("unikernelType", "mirage"),
            ("binary", "/app.hvt"),
            ("cmdline", "of image"),
        ]),
        annotations: urunc(&[("cmdline", "of user")]),
        ..Image::default()
    };
    let plan = image.plan();
    assert_eq!((plan.cmdline.as_str(), plan.boot), ("of user", BootProtocol::Hvt));
    image.args = words(&["--ipv4=10.0.0.2/24"]);
    assert_eq!(image.plan().cmdline, "--ipv4=10.0.0.2/24");
    image.entrypoint = words(&["start"]);
    assert_eq!(image.plan().cmdline, "start --ipv4=10.0.0.2/24");
    image.args.clear();
    assert_eq!(image.plan().cmdline, "start", "before any cmdline, as in urunc");
    image.cmd = words(&["-v"]);
    assert_eq!(image.plan().cmdline, "start -v");
    (image.entrypoint, image.cmd) = (Vec::new(), Vec::new());
    assert_eq!(image.plan().cmdline, "of user");
    image.annotations = urunc(&[("unikernelType", "rumprun"), ("binary", "/other")]);
    image.args.clear();
    image.cmd = words(&["redis", "-v"]);
    let plan = image.plan();
    assert_eq!((plan.kind(), plan.cmdline.as_str()), (Kind::Rumprun, r#"{"cmdline":"redis -v"}"#));
}

#[test]
fn solo5_guests_for_other_monitors_are_entered_as_their_files_say() {
    let of = |hypervisor| {
        let labels =
            urunc(&[("unikernelType", "mirage"), ("binary", "/x"), ("hypervisor", hypervisor)]);
        Image { labels, ..Image::default() }.plan().boot
    };
    assert_eq!((of("hvt"), of("qemu")), (BootProtocol::Hvt, BootProtocol::Auto));
}

/// The plan of an image with these labels, and a command of its own.
#[track_caller]
fn labelled(list: &[(&str, &str)]) -> UnikernelPlan {
    Image { labels: urunc(list), cmd: words(&["serve"]), ..Image::default() }.plan()
}

#[test]
fn a_block_and_its_mount_point_are_told_in_the_guests_words() {
    let with = |kind: &str, at: &str| {
        labelled(&[
            ("unikernelType", kind),
            ("binary", "/k"),
            ("block", "disk.img"),
            ("blkMntPoint", at),
        ])
    };
    for (kind, at, cmdline, untold) in [
        ("rust", "/data/", "disk0.mount=/data serve", false),
        ("linux", "/", "root=/dev/vda rw init=serve", false),
        ("linux", "/data", "init=serve", true),
        ("mirage", "/data", "serve", false),
        ("unikraft", "/data", "k -- serve", true),
        ("hermit", "/data", "-- serve", true),
        ("rumprun", "", r#"{"cmdline":"serve"}"#, false),
        ("rust", "", "serve", false),
    ] {
        let plan = with(kind, at);
        assert_eq!(plan.disk, Some(DiskSource::File("/disk.img".into())), "{kind}");
        assert_eq!((plan.cmdline.as_str(), !plan.left_out.is_empty()), (cmdline, untold), "{kind}");
        assert!(!untold || plan.left_out[0].contains(at), "{:?}", plan.left_out);
    }
    let rumprun: serde_json::Value =
        serde_json::from_str(&with("rumprun", "/data").cmdline).unwrap();
    assert_eq!(
        rumprun["blk"],
        serde_json::json!({"source": "etfs", "path": "/dev/ld0a", "fstype": "blk", "mountpoint": "/data"})
    );
    // Without a disk there is nothing to be mounted.
    let alone = labelled(&[("unikernelType", "rust"), ("binary", "/k"), ("blkMntPoint", "/x")]);
    assert_eq!((alone.disk, alone.cmdline.as_str()), (None, "serve"));
    // In the file, as the tools write it: base64.
    let json = serde_json::to_vec(&urunc(&[
        ("unikernelType", "cnVzdA=="),
        ("binary", "L2s="),
        ("block", "L2Q="),
        ("blkMntPoint", "L2RhdGE="),
    ]));
    let files = [("/urunc.json".to_owned(), json.unwrap())].into();
    assert_eq!(Image { files, ..Image::default() }.plan().cmdline, "disk0.mount=/data");
}

#[test]
fn all_that_is_in_the_image_is_a_disk_where_nothing_else_is_the_root() {
    let with = |kind: &str, more: &[(&str, &str)]| {
        labelled(
            &[&[("unikernelType", kind), ("binary", "/k"), ("mountRootfs", "true")], more].concat(),
        )
    };
    for (kind, cmdline) in
        [("linux", "root=/dev/vda rw init=serve"), ("rust", "disk0.mount=/ serve")]
    {
        let plan = with(kind, &[]);
        assert_eq!((plan.disk, plan.cmdline.as_str()), (Some(DiskSource::Root), cmdline));
    }
    assert!(with("rumprun", &[]).cmdline.contains(r#""mountpoint":"/data""#));
    // As urunc chooses: an initrd, then a disk for the root.
    let initrd = with("linux", &[("initrd", "/i")]);
    assert_eq!((initrd.disk, initrd.cmdline.as_str()), (None, "root=/dev/ram0 rw rdinit=serve"));
    let block = with("linux", &[("block", "/d"), ("blkMntPoint", "/")]);
    assert_eq!(block.disk, Some(DiskSource::File("/d".into())));
    for value in ["", "0", "false", "F"] {
        assert_eq!(with("linux", &[("mountRootfs", value)]).disk, None, "{value}");
    }
    let refused = |kind: &str, more: &[(&str, &str)]| {
        let list =
            [&[("unikernelType", kind), ("binary", "/k"), ("useDMBlock", "1")], more].concat();
        Image { labels: urunc(&list), ..Image::default() }.refused()
    };
    assert!(refused("unikraft", &[]).contains("9pfs"));
    assert!(refused("mirage", &[]).contains("mount no disk"));
    assert!(refused("linux", &[("block", "/d"), ("blkMntPoint", "/x")]).contains("one disk"));
}

#[test]
fn the_users_disks_come_after_the_images() {
    let at = |text: &str| Some(text.parse::<MountPoint>().unwrap());
    let labels =
        [("unikernelType", "rust"), ("binary", "/k"), ("block", "/d"), ("blkMntPoint", "/a")];
    let mut image =
        Image { labels: urunc(&labels), disks: vec![None, at("/b")], ..Image::default() };
    assert_eq!(image.plan().cmdline, "disk2.mount=/b disk0.mount=/a");
    image.labels.remove("com.urunc.unikernel.block");
    assert_eq!(image.plan().cmdline, "disk1.mount=/b");
    image.labels = urunc(&[("unikernelType", "hermit"), ("binary", "/k")]);
    assert!(image.refused().contains("/b"));
    image.disks = vec![None];
    assert_eq!(image.plan().cmdline, "");
    // A place is the user's, if both want it.
    image.disks = vec![at("/")];
    let linux = [("unikernelType", "linux"), ("binary", "/k"), ("mountRootfs", "1")];
    image.labels = urunc(&linux);
    assert_eq!(image.plan().cmdline, "root=/dev/vdb rw");
    image.labels = urunc(&[&linux[..], &[("initrd", "/i")]].concat());
    assert!(image.refused().contains("--disk"), "{}", image.refused());
}

#[test]
fn what_is_wrong_is_said_to_be_where_it_is() {
    let mut image = Image {
        labels: urunc(&[("unikernelType", "rust"), ("binary", "/k"), ("blkMntPoint", "x")]),
        ..Image::default()
    };
    let said = "com.urunc.unikernel.blkMntPoint in the image's ";
    assert!(image.refused().starts_with(&format!("{said}labels: ")), "{}", image.refused());
    image.annotations = urunc(&[("blkMntPoint", "y")]);
    assert!(
        image.refused().starts_with(&format!("{said}annotations (--annotation): ")),
        "{}",
        image.refused()
    );
}

#[test]
fn images_variables_are_for_those_who_take_them() {
    let of = |kind: &str| {
        let labels =
            urunc(&[("unikernelType", kind), ("binary", "/k"), ("unikernelVersion", "0.17.0")]);
        let plan =
            Image { labels, env: words(&["A=b c"]), cmd: words(&["x"]), ..Image::default() }.plan();
        (plan.cmdline, plan.environment)
    };
    assert_eq!(of("unikraft"), ("k env.vars=[ \"A=b c\" ] -- x".into(), true));
    assert_eq!(of("rumprun"), (r#"{"cmdline":"x","env":"A=b c"}"#.into(), true));
    assert_eq!(of("linux"), ("A=\"b c\" init=x".into(), true));
    for (kind, cmdline) in [("mirage", "x"), ("hermit", "-- x"), ("mewz", "x")] {
        assert_eq!(of(kind), (cmdline.into(), false));
    }
}

#[test]
fn guests_of_solo5_may_name_their_network_device() {
    let plan =
        labelled(&[("unikernelType", "mirage"), ("binary", "/k"), ("solo5NetDev", "management")]);
    assert_eq!(plan.dialect.solo5_net.as_deref(), Some("management"));
    assert_eq!(labelled(&[("unikernelType", "mirage"), ("binary", "/k")]).dialect.solo5_net, None);
}

#[test]
fn a_kernel_shows_whether_it_has_options_for_ipv6() {
    let knows = |kind: Kind, len: usize, at: Option<usize>| {
        let mut bytes = vec![b'i'; len];
        if let Some(at) = at {
            bytes[at..at + 12].copy_from_slice(b"ipv6-gateway");
        }
        let kernel = tempfile::tempfile().unwrap();
        kernel.write_all_at(&bytes, 0).unwrap();
        let mut dialect = Dialect::from(kind);
        dialect.look_into(&kernel).unwrap();
        dialect.ipv6
    };
    // Over the boundary of what is read at a time, too.
    let boundary = 1 << 20;
    for at in [0, 100, boundary - 12, boundary - 11, boundary - 1, boundary, 3 * boundary - 12] {
        assert!(knows(Kind::Hvt, 3 * boundary, Some(at)), "{at}");
    }
    assert!(!knows(Kind::Hvt, 3 * boundary, None));
    assert!(!knows(Kind::Hvt, 0, None));
    assert!(!knows(Kind::Rust, boundary, Some(0)));
}

#[test]
fn old_unikraft_takes_its_initrd_in_its_own_way() {
    let of = |version| {
        let labels = urunc(&[
            ("unikernelType", "unikraft"),
            ("binary", "/x"),
            ("initrd", "/i"),
            ("unikernelVersion", version),
        ]);
        let plan = Image { labels, ..Image::default() }.plan();
        (plan.cmdline, plan.environment)
    };
    for old in ["0.16.0", "0.16", "v0.5.0", "0.9.12"] {
        assert_eq!(of(old), ("x vfs.rootfs=initrd --".to_owned(), false), "{old}");
    }
    for new in ["0.16.1", "0.16.3", "0.17.0-rc1", "v1.0", "", "new"] {
        let (cmdline, environment) = of(new);
        assert!(cmdline.contains("vfs.fstab") && environment, "{new}: {cmdline}");
    }
}

#[test]
fn malformed_urunc_keys_are_named() {
    let with = |key: &str, value: &str| {
        let mut labels = urunc(&[("unikernelType", "hermit"), ("binary", "/x")]);
        labels.insert(format!("com.urunc.unikernel.{key}"), value.to_owned());
        Image { labels, ..Image::default() }.refused()
    };
    for (key, value) in [
        ("unikernelType", "plan9"),
        ("binary", ""),
        ("binary", "/a/../../etc/passwd"),
        ("initrd", "../x"),
        ("block", "/a\n"),
        ("cmdline", "a\0b"),
        ("hypervisor", "\u{1b}[2J"),
        ("unikernelVersion", &"9".repeat(5000)),
        ("mountRootfs", "true"),
        ("mountRootfs", "yes"),
        ("useDMBlock", "1"),
        ("blkMntPoint", "data"),
        ("blkMntPoint", "/a/../b"),
        ("blkMntPoint", "/a b"),
        ("blkMntPoint", "/a\",\"b\":\"/c"),
        ("blkMntPoint", "/a\u{1b}[2J"),
        ("blkMntPoint", &format!("/{}", "9".repeat(255))),
        ("solo5NetDev", "-x"),
        ("solo5NetDev", "a b"),
        ("solo5NetDev", "a=b"),
        ("solo5NetDev", &"n".repeat(68)),
    ] {
        let message = with(key, value);
        assert!(message.starts_with(&format!("com.urunc.unikernel.{key} ")), "{message}");
        assert!(!message.contains(char::is_control), "{message:?}");
    }
    let half = Image { labels: urunc(&[("binary", "/x")]), ..Image::default() };
    assert_eq!(
        half.refused(),
        "com.urunc.unikernel.unikernelType is missing in the image's labels"
    );
}

#[test]
fn malformed_urunc_files_are_refused() {
    let of = |bytes: &[u8]| {
        let files = [("/urunc.json".to_owned(), bytes.to_vec())].into();
        Image { files, ..Image::default() }.refused()
    };
    assert!(of(b"[").contains("/urunc.json in the image is malformed"));
    assert!(of(&vec![b' '; 100_000]).contains("larger than 65536"));
    assert!(of(b"{}").contains("unikernelType is missing"));
    assert!(of(br#"{"com.urunc.unikernel.binary": 5}"#).contains("no text"));
    assert!(of("[".repeat(10_000).as_bytes()).contains("malformed"));
}

#[test]
fn krafts_images_have_platform_paths_and_annotations() {
    let mut image = Image {
        unikernel_platform: true,
        env: words(&["PATH=/bin", "A=b"]),
        cmd: words(&["/server", "-v"]),
        files: [("/unikraft/bin/kernel".to_owned(), vec![1])].into(),
        ..Image::default()
    };
    let plan = image.plan();
    assert_eq!((&*plan.kernel, plan.initrd.as_deref()), ("/unikraft/bin/kernel", None));
    assert_eq!(plan.cmdline, "kernel env.vars=[ \"PATH=/bin\" \"A=b\" ] -- /server -v");
    image.files.insert("/unikraft/bin/initrd".into(), vec![2]);
    assert_eq!(image.plan().initrd.as_deref(), Some("/unikraft/bin/initrd"));
    // By annotations alone, whatever the platform.
    image.unikernel_platform = false;
    image.layer = pairs(&[
        ("org.unikraft.kernel.image", "/k/app_fc"),
        ("org.unikraft.kernel.initrd", "/k/root.cpio"),
    ]);
    let plan = image.plan();
    assert_eq!((&*plan.kernel, plan.initrd.as_deref()), ("/k/app_fc", Some("/k/root.cpio")));
    // By its place alone.
    image.layer.clear();
    assert_eq!(image.plan().kernel, "/unikraft/bin/kernel");
    image.layer = pairs(&[("org.unikraft.kernel.image", "../../kernel")]);
    assert!(image.refused().starts_with("org.unikraft.kernel.image in the image's layer"));
}

#[test]
fn hermits_program_is_known_by_its_system_and_takes_its_loader() {
    let program = b"\x7fELF\x02\x01\x01\xff\0\0".to_vec();
    let mut image = Image {
        entrypoint: words(&["/app/httpd"]),
        cmd: words(&["-p", "80"]),
        files: [("/app/httpd".to_owned(), program)].into(),
        ..Image::default()
    };
    assert!(image.refused().contains("no hermit-loader beside it"));
    image.files.insert("/app/hermit-loader".into(), vec![1]);
    let plan = image.plan();
    assert_eq!((&*plan.kernel, plan.initrd.as_deref()), ("/app/hermit-loader", Some("/app/httpd")));
    assert_eq!(plan.cmdline, "-- -p 80");
}

/// The image that bytes describe, one line for each thing it has.
fn described(bytes: &[u8]) -> Image {
    let mut image = Image::default();
    for line in String::from_utf8_lossy(bytes).split('\n') {
        let (place, rest) = line.split_at(line.char_indices().nth(1).map_or(0, |(at, _)| at));
        let (key, value) = rest.split_once('=').unwrap_or((rest, ""));
        let pair = || (key.to_owned(), value.to_owned());
        match place {
            "a" => image.annotations.extend([pair()]),
            "m" => image.manifest.extend([pair()]),
            "l" => image.layer.extend([pair()]),
            "b" => image.labels.extend([pair()]),
            "f" => image.files.extend([(key.to_owned(), value.as_bytes().to_vec())]),
            "v" => image.env.push(rest.replace('\u{1}', "\n")),
            "e" => image.entrypoint.push(rest.replace('\u{1}', "\n")),
            "c" => image.cmd.push(rest.to_owned()),
            "p" => image.unikernel_platform = true,
            _ => {}
        }
    }
    image
}

/// A document for rumprun has the keys that it may have, each with what belongs there.
fn keeps_to_its_document(line: &str) {
    let document: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).unwrap();
    for (key, value) in &document {
        match key.as_str() {
            "cmdline" | "env" => assert!(value.is_string(), "{line}"),
            "blk" => {
                let at = value["mountpoint"].as_str().unwrap();
                assert!(
                    at.starts_with('/') && at.parse::<MountPoint>().unwrap().to_string() == at,
                    "{line}"
                );
                assert_eq!(
                    (value["path"].as_str(), value.as_object().unwrap().len()),
                    (Some("/dev/ld0a"), 4)
                );
            }
            _ => panic!("{key} in {line}"),
        }
    }
}

/// Nothing that an image says leaves it or means something else, whatever was changed in it. The same
/// numbers every time; `make fuzz` has others.
#[test]
fn damaged_descriptions_are_refused_or_harmless() {
    let seeds: [&[u8]; 7] = [
        b"bcom.urunc.unikernel.unikernelType=unikraft\nbcom.urunc.unikernel.binary=/k\n\
          bcom.urunc.unikernel.cmdline=a -b \"c d\"\nbcom.urunc.unikernel.initrd=/i\nvA=b c\n\
          acom.urunc.unikernel.block=L2I=\nbcom.urunc.unikernel.unikernelVersion=0.15.0",
        b"bcom.urunc.unikernel.unikernelType=rumprun\nbcom.urunc.unikernel.binary=/k\n\
          bcom.urunc.unikernel.block=/d\nbcom.urunc.unikernel.blkMntPoint=/data\nvA=b c\nca b",
        b"bcom.urunc.unikernel.unikernelType=linux\nbcom.urunc.unikernel.binary=/k\nvA=b c\n\
          bcom.urunc.unikernel.blkMntPoint=/\nbcom.urunc.unikernel.block=/d\nc/init\ncx y",
        b"bcom.urunc.unikernel.unikernelType=rust\nbcom.urunc.unikernel.binary=/k\ncx\n\
          acom.urunc.unikernel.mountRootfs=true\nbcom.urunc.unikernel.solo5NetDev=net0",
        b"f/urunc.json={\"com.urunc.unikernel.unikernelType\":\"cnVtcHJ1bg==\",\
          \"com.urunc.unikernel.binary\":\"L2Jpbi9h\",\"com.urunc.unikernel.cmdline\":\"YSBi\"}\n/",
        b"p\nlorg.unikraft.kernel.image=/k\nlorg.unikraft.kernel.initrd=/i\nvP=/bin\nc/app\nc-x y\n\
          mkrun.cpus=2",
        b"e/x/app\nca 'b\nf/x/app=\x7fELF\x02\x01\x01\xff\nf/x/hermit-loader=x\nmkrun.ram_mib=64",
    ];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut below = |bound: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % bound.max(1) as u64) as usize
    };
    let mut plans = 0;
    for round in 0..20_000 {
        let mut bytes = seeds[round % seeds.len()].to_vec();
        for _ in 0..below(4) {
            let at = below(bytes.len());
            let special = b"\0\x01\n\r\x1b\"' =/.[]-:,{}\\\xff\xc3";
            match below(4) {
                0 => bytes[at] = special[below(special.len())],
                1 => bytes.insert(at, special[below(special.len())]),
                2 => drop(bytes.splice(at..at, *b"/../")),
                _ => drop(bytes.remove(at)),
            }
        }
        let image = described(&bytes);
        let plan = match image.recognise() {
            Ok(Recognised::Unikernel(plan)) => plan,
            Ok(Recognised::Linux(_)) => continue,
            Err(e) => {
                let message = e.to_string();
                assert!(!message.contains(char::is_control), "{message:?}");
                continue;
            }
        };
        plans += 1;
        let disk = match &plan.disk {
            Some(DiskSource::File(path)) => Some(path),
            Some(DiskSource::Root) | None => None,
        };
        let paths = [Some(&plan.kernel), plan.initrd.as_ref(), disk];
        for path in paths.into_iter().flatten() {
            assert!(path.starts_with('/') && !path.split('/').any(|part| part == ".."), "{path:?}");
            assert!(!path.contains(char::is_control), "{path:?}");
        }
        assert!(!plan.cmdline.contains(char::is_control), "{:?}", plan.cmdline);
        if plan.kind() == Kind::Unikraft {
            // Nothing but the list itself opens or closes the list of variables.
            let words = plan.cmdline.split(" -- ").next().unwrap();
            assert_eq!(words.matches('"').count() % 2, 0, "{words}");
        }
        if plan.kind() == Kind::Rumprun {
            keeps_to_its_document(&plan.cmdline);
        }
    }
    assert!(plans > 1000, "{plans}");
}

#[test]
fn krun_sizes_are_heeded_and_checked() {
    let of =
        |list: &[(&str, &str)]| Image { manifest: pairs(list), ..Image::default() }.recognise();
    let size = Size { cpus: Some(2), memory: Some(256 << 20) };
    assert_eq!(of(&[("krun.cpus", "2"), ("krun.ram_mib", "256")]), Ok(Recognised::Linux(size)));
    for (key, value) in [
        ("krun.cpus", "0"),
        ("krun.cpus", "1000000"),
        ("krun.cpus", "+1"),
        ("krun.cpus", "two"),
        ("krun.ram_mib", ""),
        ("krun.ram_mib", "18446744073709551616"),
        ("krun.ram_mib", "-1"),
        ("krun.ram_mib", "1"),
    ] {
        let message = of(&[(key, value)]).unwrap_err().to_string();
        assert!(message.starts_with(key), "{message}");
    }
}

/// Whatever an image says: an answer that keeps its promises, or one line that says no.
#[test]
fn damaged_input_gives_a_sound_plan_or_one_line() {
    let seed = serde_json::to_vec(&urunc(&[
        ("unikernelType", "dW5pa3JhZnQ="),
        ("binary", "L3VuaWtlcm5lbC9hcHA="),
        ("cmdline", "bmdpbnggLWMgL2V0Yy9uZ2lueC5jb25m"),
        ("initrd", "dW5pa2VybmVsL2luaXRyZA=="),
        ("unikernelVersion", "MC4xNy4w"),
    ]))
    .unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut below = |limit: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % limit as u64) as usize
    };
    let (mut plans, mut refusals) = (0, 0);
    for _ in 0..20_000 {
        let mut json = seed.clone();
        for _ in 0..=below(3) {
            let at = below(json.len());
            match below(4) {
                0 => json[at] = below(256) as u8,
                1 => json.truncate(at.max(1)),
                2 => json.insert(at, json[below(json.len())]),
                _ => drop(json.remove(at)),
            }
            if json.is_empty() {
                json.push(b'{');
            }
        }
        let files = [("/urunc.json".to_owned(), json)].into();
        match (Image { files, ..Image::default() }).recognise() {
            Ok(Recognised::Unikernel(plan)) => {
                plans += 1;
                for path in [Some(&plan.kernel), plan.initrd.as_ref()].into_iter().flatten() {
                    assert!(path.starts_with('/') && !path.split('/').any(|p| p == ".."), "{path}");
                }
                assert!(!plan.cmdline.contains(char::is_control), "{:?}", plan.cmdline);
            }
            Ok(Recognised::Linux(_)) => panic!("there is a file that says otherwise"),
            Err(e) => {
                refusals += 1;
                assert!(!e.to_string().contains(char::is_control), "{:?}", e.to_string());
            }
        }
    }
    assert!(plans > 1000 && refusals > 1000, "{plans} plans, {refusals} refusals");
}
