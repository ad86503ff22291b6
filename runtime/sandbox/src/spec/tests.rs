use oci_spec::image::ConfigBuilder;

use super::*;

fn image() -> ImageConfig {
    ConfigBuilder::default()
        .entrypoint(vec!["/entry".to_owned()])
        .cmd(vec!["arg".to_owned()])
        .env(vec!["PATH=/bin".to_owned(), "A=1".to_owned()])
        .working_dir("/srv".to_owned())
        .user("daemon".to_owned())
        .volumes(vec!["/data".to_owned()])
        .build()
        .unwrap()
}

fn make(options: &Options) -> Spec {
    container("0123456789ab", &image(), options).unwrap().spec
}

fn args(options: &Options) -> Vec<String> {
    make(options).process().clone().unwrap().args().clone().unwrap()
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

#[test]
fn image_alone_decides_what_runs() {
    let process = make(&Options::default()).process().clone().unwrap();
    assert_eq!(process.args().clone().unwrap(), ["/entry", "arg"]);
    assert_eq!(process.cwd(), &PathBuf::from("/srv"));
    assert_eq!(process.user().username().as_deref(), Some("daemon"));
    let env = process.env().clone().unwrap();
    assert_eq!(env, ["PATH=/bin", "HOSTNAME=0123456789ab", "A=1"]);
}

#[test]
fn command_replaces_cmd_and_entrypoint_drops_it() {
    let command = Options { command: strings(&["x", "y"]), ..Default::default() };
    assert_eq!(args(&command), ["/entry", "x", "y"]);
    let entry = Options { entrypoint: Some("/sh".into()), ..Default::default() };
    assert_eq!(args(&entry), ["/sh"]);
    let both = Options { entrypoint: Some("/sh".into()), ..command.clone() };
    assert_eq!(args(&both), ["/sh", "x", "y"]);
    let cleared = Options { entrypoint: Some(String::new()), ..command };
    assert_eq!(args(&cleared), ["x", "y"]);
}

#[test]
fn nothing_to_run_is_an_error() {
    let empty = ImageConfig::default();
    let e = container("ab", &empty, &Options::default()).unwrap_err();
    assert!(matches!(e, Error::NoCommand));
}

#[test]
fn variables_replace_in_place_and_bare_names_remove() {
    let options = Options { env: strings(&["A=2", "B=3", "HOSTNAME"]), ..Default::default() };
    let env = make(&options).process().clone().unwrap().env().clone().unwrap();
    assert_eq!(env, ["PATH=/bin", "A=2", "B=3"]);
    let bad = Options { env: strings(&["=x"]), ..Default::default() };
    assert!(matches!(container("ab", &image(), &bad), Err(Error::Environment(_))));
}

#[test]
fn users_are_numbers_or_left_to_the_guest() {
    assert_eq!(user_ids("7:8"), (7, 8, None));
    assert_eq!(user_ids("0:0"), (0, 0, None));
    assert_eq!(user_ids(""), (0, 0, Some("0".into())));
    assert_eq!(user_ids("7"), (7, 0, Some("7".into())));
    assert_eq!(user_ids("www:adm"), (0, 0, Some("www:adm".into())));
    assert_eq!(user_ids("7:adm"), (7, 0, Some("7:adm".into())));
}

#[test]
fn relative_working_directory_is_the_users_error_only() {
    let options = Options { cwd: Some("srv".into()), ..Default::default() };
    assert!(matches!(container("ab", &image(), &options), Err(Error::WorkingDirectory(_))));
}

#[test]
fn terminal_sets_term_and_size() {
    let options = Options { terminal: true, console_size: Some((80, 24)), ..Default::default() };
    let process = make(&options).process().clone().unwrap();
    assert_eq!(process.terminal(), Some(true));
    assert_eq!(process.console_size().map(|b| (b.width(), b.height())), Some((80, 24)));
    assert!(process.env().clone().unwrap().contains(&"TERM=xterm".to_owned()));
}

#[test]
fn root_holds_its_capabilities_and_others_only_the_bound() {
    let root = Options { user: Some("0:0".into()), ..Default::default() };
    let caps = make(&root).process().clone().unwrap().capabilities().clone().unwrap();
    assert_eq!(caps.effective().as_ref().map(HashMapLen::len_of), Some(14));
    let user = Options { user: Some("7:7".into()), ..Default::default() };
    let caps = make(&user).process().clone().unwrap().capabilities().clone().unwrap();
    assert_eq!(caps.effective().as_ref().map(HashMapLen::len_of), Some(0));
    assert_eq!(caps.bounding().as_ref().map(HashMapLen::len_of), Some(14));
}

trait HashMapLen {
    fn len_of(&self) -> usize;
}

impl HashMapLen for caps::Set {
    fn len_of(&self) -> usize {
        self.len()
    }
}

#[test]
fn default_mounts_masks_and_namespaces_are_there() {
    let spec = make(&Options::default());
    let mounts = spec.mounts().clone().unwrap();
    let targets: Vec<_> = mounts.iter().map(|m| m.destination().display().to_string()).collect();
    for target in ["/proc", "/dev", "/dev/pts", "/dev/shm", "/sys", "/etc/hosts", "/etc/hostname"] {
        assert!(targets.contains(&target.to_owned()), "{target}");
    }
    let linux = spec.linux().clone().unwrap();
    assert!(linux.masked_paths().clone().unwrap().contains(&"/proc/kcore".to_owned()));
    assert!(linux.seccomp().is_none());
    assert_eq!(linux.namespaces().clone().unwrap().len(), 5);
    assert_eq!(spec.hostname().as_deref(), Some("0123456789ab"));
}

#[test]
fn read_only_root_keeps_volumes_writable() {
    let options =
        Options { read_only: true, tmpfs: vec!["/run".parse().unwrap()], ..Default::default() };
    let spec = make(&options);
    assert_eq!(spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly), Some(true));
    let mounts = spec.mounts().clone().unwrap();
    for target in ["/data", "/run"] {
        assert!(mounts.iter().any(|m| m.destination() == &PathBuf::from(target)), "{target}");
    }
}

#[test]
fn later_ulimit_of_a_kind_wins() {
    let options = Options {
        ulimits: vec!["nofile=1".parse().unwrap(), "nofile=2".parse().unwrap()],
        ..Default::default()
    };
    let limits = make(&options).process().clone().unwrap().rlimits().clone().unwrap();
    assert_eq!(limits.len(), 1);
    assert_eq!(limits[0].soft(), 2);
}

#[test]
fn half_a_cpu_is_a_quota() {
    let options = Options { cpus: Some("1.5".parse().unwrap()), ..Default::default() };
    let cpu = make(&options).linux().clone().unwrap().resources().clone().unwrap().cpu().clone();
    assert_eq!(cpu.and_then(|c| c.quota()), Some(150_000));
}

#[test]
fn another_user_has_the_capabilities_that_go_with_it() {
    let root = Options { user: Some("0:0".into()), ..Default::default() };
    let mut process = make(&root).process().clone().unwrap();
    change_user(&mut process, None, false).unwrap();
    let held = |p: &Process| {
        let caps = p.capabilities().clone().unwrap();
        (caps.effective().clone().unwrap().len(), caps.bounding().clone().unwrap().len())
    };
    assert_eq!(held(&process), (14, 14));
    change_user(&mut process, Some("7:7"), false).unwrap();
    assert_eq!((process.user().uid(), held(&process)), (7, (0, 14)));
    change_user(&mut process, Some("0:0"), true).unwrap();
    assert_eq!(held(&process), (41, 41));
}
