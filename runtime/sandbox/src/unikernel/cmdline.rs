//! Command lines, in the form that each kind of guest wants.

use super::{Error, Kind, Mount};

/// What goes on a command line.
#[derive(Debug, Clone, Copy, Default)]
pub struct Words<'a> {
    /// Name of the kernel's file: Unikraft and multiboot kernels want one before everything else.
    pub kernel: &'a str,
    /// Variables, `NAME=VALUE`, for kinds that take them.
    pub env: &'a [String],
    /// There is an initrd, which is to be the root file system.
    pub initrd: bool,
    /// Unikraft before 0.16.1 takes its initrd in another way, and no variables.
    pub old_unikraft: bool,
    /// Where file systems on disks are to be mounted, for kinds that can be told.
    pub mounts: &'a [Mount],
    /// For Linux: the first argument is the program that it starts, and the others are that program's.
    pub init: bool,
    /// Words for the kernel itself.
    pub kernel_args: &'a str,
    /// The application's arguments.
    pub args: &'a [String],
}

/// Ends the words for the kernel.
const SEPARATOR: &str = "--";

impl Words<'_> {
    /// The command line for a guest of this kind.
    ///
    /// # Errors
    /// [`Error::Word`]: a word that would be taken for something else.
    pub fn cmdline(&self, kind: Kind) -> Result<String, Error> {
        let extra = self.kernel_args.trim();
        if extra.chars().any(char::is_control) {
            return Err(word("the words for the kernel", CONTROL));
        }
        let kernel_args: Vec<String> = extra.split_whitespace().map(str::to_owned).collect();
        if kind == Kind::Linux {
            return self.linux(&kernel_args);
        }
        let args = self.arguments(kind)?;
        match kind {
            Kind::Unikraft => self.unikraft(&kernel_args, &args),
            Kind::Multiboot => Ok(join(&[&[self.app()], &kernel_args, &args])),
            Kind::Hermit if args.is_empty() => Ok(kernel_args.join(" ")),
            Kind::Hermit => Ok(join(&[&kernel_args, &[SEPARATOR.to_owned()], &args])),
            Kind::Rumprun if !extra.is_empty() => {
                Err(word("a word for the kernel", "rumprun takes none"))
            }
            Kind::Rumprun => self.rumprun(&args),
            Kind::Rust => Ok(join(&[&self.mount_words(kind), &kernel_args, &args])),
            Kind::Nanos => Ok(join(&[&self.nanos_environment()?, &kernel_args, &args])),
            Kind::Hvt | Kind::Linux => Ok(join(&[&kernel_args, &args])),
        }
    }

    fn mount_words(&self, kind: Kind) -> Vec<String> {
        self.mounts.iter().flat_map(|mount| mount.words(kind)).collect()
    }

    /// `APP env.vars=[ ... ] vfs.fstab=[ ... ] WORDS -- ARGS`.
    fn unikraft(&self, kernel_args: &[String], args: &[String]) -> Result<String, Error> {
        let mut line = vec![self.app()];
        if !self.env.is_empty() && !self.old_unikraft {
            line.push("env.vars=[".into());
            for variable in self.env {
                line.push(format!("\"{}\"", plain_variable(variable)?));
            }
            line.push("]".into());
        }
        // A table of the user's has the initrd in it, if that is what they want.
        let said = kernel_args.iter().any(|word| word.starts_with("vfs."));
        if self.initrd && !said {
            line.push(match self.old_unikraft {
                true => "vfs.rootfs=initrd".into(),
                false => "vfs.fstab=[ \"initrd0:/:extract:::\" ]".into(),
            });
        }
        Ok(join(&[&line, kernel_args, &[SEPARATOR.to_owned()], args]))
    }

    /// `{"cmdline":"ARGS","env":"K=V",...,"blk":{...}}`: what rumprun reads (its `lib/librumprun_base/config.c`) is
    /// nearly JSON. Each variable has a key `env` of its own, and what stands in quotes is taken as it is.
    fn rumprun(&self, args: &[String]) -> Result<String, Error> {
        let mut document = format!("{{\"cmdline\":{}", serde_json::json!(args.join(" ")));
        for variable in self.env {
            document += &format!(",\"env\":\"{}\"", plain_variable(variable)?);
        }
        if let Some(mount) = self.mounts.iter().find(|m| m.untold(Kind::Rumprun).is_none()) {
            document += &format!(",\"blk\":{}", mount.rumprun());
        }
        Ok(document + "}")
    }

    /// `environment.K=V ...`: Nanos takes whatever is in its manifest from its command line as well. A value ends
    /// at white space there, and a dot in a name leads further down.
    fn nanos_environment(&self) -> Result<Vec<String>, Error> {
        let told = |variable: &String| {
            let name = variable.split('=').next().unwrap_or_default();
            if plain_variable(variable)?.contains(char::is_whitespace) || name.contains('.') {
                return Err(word(
                    &format!("the variable {name:?}"),
                    "Nanos takes no white space in values, and no dot in names",
                ));
            }
            Ok(format!("environment.{variable}"))
        };
        self.env.iter().map(told).collect()
    }

    /// `MOUNTS WORDS VARIABLES ARGS`, or, if the arguments are a program and its arguments,
    /// `MOUNTS WORDS VARIABLES init=PROGRAM -- ARGS`. What Linux does not know and looks like a variable is one of that
    /// program's (`Documentation/admin-guide/kernel-parameters.rst`).
    fn linux(&self, kernel_args: &[String]) -> Result<String, Error> {
        let said = |key: &str| kernel_args.iter().any(|word| word.starts_with(key));
        let mut line = match self.initrd && self.init {
            _ if said("root=") => Vec::new(),
            true => vec!["root=/dev/ram0".to_owned(), "rw".to_owned()],
            false => self.mount_words(Kind::Linux),
        };
        line.extend_from_slice(kernel_args);
        for variable in self.env {
            let (name, value) = plain_variable(variable)?.split_once('=').unwrap_or((variable, ""));
            if name.is_empty() || name.contains(char::is_whitespace) {
                return Err(word(&format!("the variable {name:?}"), "that is no name"));
            }
            match value.contains(char::is_whitespace) {
                true => line.push(format!("{name}=\"{value}\"")),
                false => line.push(format!("{name}={value}")),
            }
        }
        if !self.init {
            return Ok(join(&[&line, &self.arguments(Kind::Linux)?]));
        }
        let Some((program, rest)) = self.args.split_first() else { return Ok(line.join(" ")) };
        let key = if self.initrd { "rdinit=" } else { "init=" };
        if !said(key) {
            line.push(format!("{key}{}", init_word(program)?));
        }
        if !rest.is_empty() {
            line.push(SEPARATOR.into());
        }
        for arg in rest {
            line.push(init_word(arg)?);
        }
        Ok(line.join(" "))
    }

    /// The name of the kernel's file as far as it can stand on a command line.
    fn app(&self) -> String {
        let name = self.kernel.rsplit('/').next().unwrap_or_default();
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let name: String = name.chars().filter(|c| plain(*c)).collect();
        match name.trim_start_matches('-') {
            "" => "unikernel".into(),
            name => name.into(),
        }
    }

    /// The arguments, those with white space in quotes. Unikraft takes quotes apart itself, so that
    /// a quote in an argument has to be in the other kind of quotes.
    fn arguments(&self, kind: Kind) -> Result<Vec<String>, Error> {
        let quoted = |arg: &String| {
            if arg.chars().any(char::is_control) {
                return Err(word(&format!("the argument {arg:?}"), CONTROL));
            }
            if kind == Kind::Rumprun {
                return rumprun_word(arg);
            }
            let marked = kind == Kind::Unikraft && arg.contains(['"', '\'']);
            if !arg.is_empty() && !marked && !arg.contains(char::is_whitespace) {
                return Ok(arg.clone());
            }
            match (arg.contains('"'), arg.contains('\'')) {
                (false, _) => Ok(format!("\"{arg}\"")),
                (true, false) => Ok(format!("'{arg}'")),
                (true, true) => {
                    Err(word(&format!("the argument {arg:?}"), "it has both kinds of quotes"))
                }
            }
        };
        self.args.iter().map(quoted).collect()
    }
}

/// A variable that can stand in double quotes.
fn plain_variable(variable: &str) -> Result<&str, Error> {
    if variable.contains(['"', '\\']) || variable.chars().any(char::is_control) {
        let name = variable.split('=').next().unwrap_or_default();
        let what = format!("the variable {name:?}");
        return Err(word(&what, "there is a quote, backslash or control character in it"));
    }
    Ok(variable)
}

/// An argument for rumprun, which takes backslashes off itself (its `lib/librumprun_base/parseargs.c`), and those of JSON with
/// them, so that double quotes and backslashes come through, and single quotes keep white space.
fn rumprun_word(arg: &str) -> Result<String, Error> {
    match arg.is_empty() || arg.contains(char::is_whitespace) {
        _ if arg.contains('\'') => Err(word(
            &format!("the argument {arg:?}"),
            "rumprun takes no single quotes in arguments",
        )),
        true => Ok(format!("'{arg}'")),
        false => Ok(arg.to_owned()),
    }
}

/// An argument of the program that Linux starts. Linux takes off the double quotes around a word, and those within
/// one keep white space in it together (`lib/cmdline.c`, `next_arg`).
fn init_word(arg: &str) -> Result<String, Error> {
    let bad = |reason| Err(word(&format!("the argument {arg:?}"), reason));
    let (quotes, spaced) = (arg.matches('"').count(), arg.contains(char::is_whitespace));
    if arg.chars().any(char::is_control) {
        return bad(CONTROL);
    }
    match arg.is_empty() || spaced {
        true if quotes > 0 => bad("Linux takes no argument with white space and double quotes"),
        true => Ok(format!("\"{arg}\"")),
        false if quotes % 2 == 1 || arg.starts_with('"') => {
            bad("Linux takes double quotes in an argument by twos, and not at its beginning")
        }
        false => Ok(arg.to_owned()),
    }
}

const CONTROL: &str = "there is a control character in it";

fn word(what: &str, reason: &'static str) -> Error {
    Error::Word { what: what.to_owned(), reason }
}

fn join(lists: &[&[String]]) -> String {
    let words: Vec<&str> = lists.iter().flat_map(|list| list.iter().map(String::as_str)).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(words: &[&str]) -> Vec<String> {
        words.iter().map(|w| (*w).to_owned()).collect()
    }

    #[test]
    fn every_kind_has_its_form() {
        let (args, env) = (list(&["-p", "80"]), list(&["A=b c", "D="]));
        let words = Words {
            kernel: "/unikraft/bin/nginx_fc",
            env: &env,
            initrd: true,
            kernel_args: " x.y=1 ",
            args: &args,
            ..Words::default()
        };
        for (kind, line) in [
            (Kind::Rust, "x.y=1 -p 80"),
            (Kind::Linux, "x.y=1 A=\"b c\" D= -p 80"),
            (Kind::Multiboot, "nginx_fc x.y=1 -p 80"),
            (Kind::Hermit, "x.y=1 -- -p 80"),
            (
                Kind::Unikraft,
                "nginx_fc env.vars=[ \"A=b c\" \"D=\" ] vfs.fstab=[ \"initrd0:/:extract:::\" ] x.y=1 -- -p 80",
            ),
        ] {
            assert_eq!(words.cmdline(kind).unwrap(), line);
        }
        let old = Words { old_unikraft: true, kernel_args: "", ..words };
        assert_eq!(old.cmdline(Kind::Unikraft).unwrap(), "nginx_fc vfs.rootfs=initrd -- -p 80");
        assert!(words.cmdline(Kind::Rumprun).is_err());
        assert_eq!(
            Words { kernel_args: "", ..words }.cmdline(Kind::Rumprun).unwrap(),
            r#"{"cmdline":"-p 80","env":"A=b c","env":"D="}"#
        );
        let nothing = Words::default();
        assert_eq!(nothing.cmdline(Kind::Hermit).unwrap(), "");
        assert_eq!(nothing.cmdline(Kind::Unikraft).unwrap(), "unikernel --");
    }

    #[test]
    fn mounts_are_told_where_each_kind_looks_for_them() {
        let args = list(&["serve"]);
        let at = |at: &str| [Mount { disk: 0, at: at.parse().unwrap() }];
        let (root, data) = (at("/"), at("/data"));
        let line = |kind, mounts: &[Mount], kernel_args| {
            Words { mounts, kernel_args, args: &args, ..Words::default() }.cmdline(kind).unwrap()
        };
        assert_eq!(line(Kind::Rust, &data, "quiet"), "disk0.mount=/data quiet serve");
        assert_eq!(line(Kind::Linux, &root, "quiet"), "root=/dev/vda rw quiet serve");
        assert_eq!(line(Kind::Linux, &root, "root=/dev/vdb ro"), "root=/dev/vdb ro serve");
        assert_eq!(line(Kind::Linux, &data, ""), "serve");
        assert_eq!(line(Kind::Hvt, &data, ""), "serve");
        assert_eq!(line(Kind::Unikraft, &data, ""), "unikernel -- serve");
        let told: serde_json::Value =
            serde_json::from_str(&line(Kind::Rumprun, &data, "")).unwrap();
        assert_eq!(
            told,
            serde_json::json!({
                "cmdline": "serve",
                "blk": {"source": "etfs", "path": "/dev/ld0a", "fstype": "blk", "mountpoint": "/data"},
            })
        );
    }

    #[test]
    fn a_table_of_the_users_is_the_whole_table() {
        let words = Words {
            initrd: true,
            kernel_args: "vfs.fstab=[ \"fs0:/:ramfs:::\" ]",
            ..Words::default()
        };
        assert_eq!(
            words.cmdline(Kind::Unikraft).unwrap(),
            "unikernel vfs.fstab=[ \"fs0:/:ramfs:::\" ] --"
        );
    }

    #[test]
    fn linux_is_told_its_init_and_what_that_is_told() {
        let env = list(&["PATH=/bin", "A=b c"]);
        let line = |initrd, args: &[&str]| {
            let args = list(args);
            Words { initrd, init: true, env: &env, args: &args, ..Words::default() }
                .cmdline(Kind::Linux)
        };
        assert_eq!(
            line(false, &["/urunit", "nginx", "-g", "daemon off;"]).unwrap(),
            "PATH=/bin A=\"b c\" init=/urunit -- nginx -g \"daemon off;\""
        );
        assert_eq!(
            line(true, &["/init"]).unwrap(),
            "root=/dev/ram0 rw PATH=/bin A=\"b c\" rdinit=/init"
        );
        assert_eq!(line(false, &[]).unwrap(), "PATH=/bin A=\"b c\"");
        assert_eq!(
            line(false, &["/i", "{\"a\":\"b\"}", "", "it's"]).unwrap(),
            "PATH=/bin A=\"b c\" init=/i -- {\"a\":\"b\"} \"\" it's"
        );
        for bad in ["a\"b", "\"a\"", "a \"b\"", "a\nb", "\0"] {
            assert!(line(false, &["/i", bad]).is_err(), "{bad:?}");
            assert!(line(false, &[bad]).is_err(), "{bad:?}");
        }
        let env = list(&["A B=c"]);
        let odd = Words { env: &env, ..Words::default() };
        assert!(odd.cmdline(Kind::Linux).is_err());
    }

    /// What rumprun makes of its document: the text between the quotes is taken as it is, and split by the rules of
    /// its own.
    fn rumprun_splits(document: &str) -> Vec<String> {
        let raw = document
            .strip_prefix("{\"cmdline\":\"")
            .and_then(|rest| rest.strip_suffix("\"}"))
            .unwrap();
        let (mut all, mut open, mut quote) = (Vec::new(), None::<String>, None);
        let mut chars = raw.chars();
        while let Some(c) = chars.next() {
            match c {
                '\\' => open.get_or_insert_default().push(chars.next().unwrap()),
                ' ' if quote.is_none() => all.extend(open.take()),
                c if quote == Some(c) => quote = None,
                '\'' | '"' => {
                    open.get_or_insert_default();
                    quote = Some(c);
                }
                c => open.get_or_insert_default().push(c),
            }
        }
        all.extend(open);
        all
    }

    #[test]
    fn rumprun_gets_its_arguments_as_they_are() {
        let args = ["a", "b c", "", "say \"x\"", "\\d", "{\"k\":1}", "\u{e4}"];
        let list = list(&args);
        let line = Words { args: &list, ..Words::default() }.cmdline(Kind::Rumprun).unwrap();
        assert_eq!(rumprun_splits(&line), args);
        let quote = ["it's".to_owned()];
        assert!(Words { args: &quote, ..Words::default() }.cmdline(Kind::Rumprun).is_err());
    }

    #[test]
    fn nanos_has_variables_in_its_manifest() {
        let line = |variable: &str| {
            let env = list(&[variable]);
            Words { env: &env, kernel_args: "trace=t", ..Words::default() }.cmdline(Kind::Nanos)
        };
        assert_eq!(line("PROD=1").unwrap(), "environment.PROD=1 trace=t");
        for bad in ["A=b c", "A.b=c", "A=\"", "A=\n"] {
            assert!(line(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn words_cannot_become_others() {
        let line = |kind, args: &[&str]| {
            let args = list(args);
            Words { args: &args, ..Words::default() }.cmdline(kind)
        };
        assert_eq!(line(Kind::Rust, &["a b", "it's", ""]).unwrap(), "\"a b\" it's \"\"");
        assert_eq!(line(Kind::Unikraft, &["it's"]).unwrap(), "unikernel -- \"it's\"");
        assert_eq!(line(Kind::Rust, &["say \"a\""]).unwrap(), "'say \"a\"'");
        assert!(line(Kind::Rust, &["' \""]).is_err());
        assert!(line(Kind::Rust, &["a\nb"]).is_err());
        assert!(line(Kind::Rust, &["a\0b"]).is_err());
        let env = list(&["A=\" ] vfs.rootfs=evil [ \""]);
        let evil = Words { env: &env, ..Words::default() }.cmdline(Kind::Unikraft).unwrap_err();
        assert!(evil.to_string().contains("\"A\""), "{evil}");
    }
}
