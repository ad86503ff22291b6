//! Command lines, in the form that each kind of guest wants.

use super::{Error, Kind};

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
        let args = self.arguments(kind)?;
        let kernel_args: Vec<String> = extra.split_whitespace().map(str::to_owned).collect();
        match kind {
            Kind::Unikraft => self.unikraft(&kernel_args, &args),
            Kind::Multiboot => Ok(join(&[&[self.app()], &kernel_args, &args])),
            Kind::Hermit if args.is_empty() => Ok(kernel_args.join(" ")),
            Kind::Hermit => Ok(join(&[&kernel_args, &[SEPARATOR.to_owned()], &args])),
            Kind::Rumprun if !extra.is_empty() => {
                Err(word("a word for the kernel", "rumprun takes none"))
            }
            Kind::Rumprun => Ok(serde_json::json!({ "cmdline": args.join(" ") }).to_string()),
            Kind::Rust | Kind::Nanos | Kind::Hvt | Kind::Linux => Ok(join(&[&kernel_args, &args])),
        }
    }

    /// `APP env.vars=[ ... ] vfs.fstab=[ ... ] WORDS -- ARGS`.
    fn unikraft(&self, kernel_args: &[String], args: &[String]) -> Result<String, Error> {
        let mut line = vec![self.app()];
        if !self.env.is_empty() && !self.old_unikraft {
            line.push("env.vars=[".into());
            for variable in self.env {
                if variable.contains(['"', '\\']) || variable.chars().any(char::is_control) {
                    let name = variable.split('=').next().unwrap_or_default();
                    let what = format!("the variable {name:?}");
                    return Err(word(
                        &what,
                        "there is a quote, backslash or control character in it",
                    ));
                }
                line.push(format!("\"{variable}\""));
            }
            line.push("]".into());
        }
        if self.initrd {
            line.push(match self.old_unikraft {
                true => "vfs.rootfs=initrd".into(),
                false => "vfs.fstab=[ \"initrd0:/:extract:::\" ]".into(),
            });
        }
        Ok(join(&[&line, kernel_args, &[SEPARATOR.to_owned()], args]))
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
            (Kind::Linux, "x.y=1 -p 80"),
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
        assert_eq!(old.cmdline(Kind::Rumprun).unwrap(), r#"{"cmdline":"-p 80"}"#);
        assert!(words.cmdline(Kind::Rumprun).is_err());
        let nothing = Words::default();
        assert_eq!(nothing.cmdline(Kind::Hermit).unwrap(), "");
        assert_eq!(nothing.cmdline(Kind::Unikraft).unwrap(), "unikernel --");
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
