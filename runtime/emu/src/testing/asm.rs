//! Guest programs as assembly: `asm!(64 at CODE, [again]; set_label(&mut again); dec(rcx); jnz(again);)`.

/// Assembles the methods of iced-x86's `CodeAssembler` named in it; the labels in brackets are made first.
macro_rules! asm {
    ($bits:literal at $origin:expr; $($rest:tt)*) => { asm!($bits at $origin, []; $($rest)*) };
    ($bits:literal at $origin:expr, [$($label:ident),*]; $($($name:ident($($arg:expr),*)).+;)*) => {{
        let mut assembler =
            iced_x86::code_asm::CodeAssembler::new($bits).expect("16, 32 or 64 bits");
        $(#[allow(unused_mut)] let mut $label = assembler.create_label();)*
        $(assembler$(.$name($($arg),*))+.expect("an instruction");)*
        assembler.assemble($origin).expect("a program")
    }};
}

pub(crate) use asm;
