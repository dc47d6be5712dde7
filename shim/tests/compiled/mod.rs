//! A seccomp profile as the kernel gets it: compiled by libseccomp, and run on calls by an interpreter of classic BPF.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

/// `AUDIT_ARCH_X86_64`, x32 included.
pub(crate) const X86_64: u32 = 0xC000_003E;
/// `AUDIT_ARCH_I386`.
pub(crate) const I386: u32 = 0x4000_0003;

/// `SECCOMP_RET_*` with its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Action(u32);

impl Action {
    pub(crate) const ALLOW: Self = Self(0x7fff_0000);
    pub(crate) const NOTIFY: Self = Self(0x7fc0_0000);
}

/// What a filter sees of a call (`struct seccomp_data`).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pub(crate) arch: u32,
    pub(crate) number: u32,
    pub(crate) args: [u64; 6],
}

impl Call {
    fn word(&self, offset: u32) -> u32 {
        match offset {
            0 => self.number,
            4 => self.arch,
            // The instruction pointer means nothing here.
            8 | 12 => 0,
            _ => {
                let place = (offset - 16) as usize;
                let arg = self.args[place / 8];
                if place.is_multiple_of(8) {
                    arg as u32
                } else {
                    (arg >> 32) as u32
                }
            }
        }
    }
}

/// A compiled filter.
#[derive(Debug)]
pub(crate) struct Filter(Vec<Instruction>);

/// `struct sock_filter`.
#[derive(Debug, Clone, Copy)]
struct Instruction {
    code: u16,
    yes: u8,
    no: u8,
    k: u32,
}

impl Filter {
    /// What the kernel would do to this call.
    pub(crate) fn run(&self, call: &Call) -> Action {
        let (mut at, mut a) = (0usize, 0u32);
        loop {
            let Instruction { code, yes, no, k } = self.0[at];
            at += 1;
            let mut branch = |taken: bool| at += usize::from(if taken { yes } else { no });
            match code {
                // BPF_LD | BPF_W | BPF_ABS
                0x20 => a = call.word(k),
                // BPF_ALU | BPF_AND | BPF_K
                0x54 => a &= k,
                // BPF_JMP: JA, JEQ, JGT, JGE, JSET with a constant
                0x05 => at += k as usize,
                0x15 => branch(a == k),
                0x25 => branch(a > k),
                0x35 => branch(a >= k),
                0x45 => branch(a & k != 0),
                // BPF_RET | BPF_K
                0x06 => return Action(k),
                other => panic!("libseccomp uses an instruction {other:#x} that is not known here"),
            }
        }
    }
}

/// The compiler, built once.
fn compiler() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/seccomp/compile.c");
        let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("compile");
        // Another run may do the same: each renames its own into place.
        let fresh = program.with_extension(std::process::id().to_string());
        let status = Command::new("gcc")
            .args(["-O1", "-Wall", "-o"])
            .args([&fresh, &source])
            .arg("-lseccomp")
            .status()
            .expect("run gcc");
        assert!(
            status.success(),
            "gcc could not compile {} (apt-get install libseccomp-dev)",
            source.display()
        );
        std::fs::rename(&fresh, &program).expect("rename the compiler");
        program
    })
}

/// The action as libseccomp has it: the runtimes give ERRNO and TRACE without a value EPERM.
fn action(name: &str, errno: Option<u64>) -> u32 {
    let errno = errno.unwrap_or(1) as u32;
    match name {
        "SCMP_ACT_ALLOW" => 0x7fff_0000,
        "SCMP_ACT_LOG" => 0x7ffc_0000,
        "SCMP_ACT_TRACE" => 0x7ff0_0000 | errno,
        "SCMP_ACT_NOTIFY" => 0x7fc0_0000,
        "SCMP_ACT_ERRNO" => 0x0005_0000 | errno,
        "SCMP_ACT_TRAP" => 0x0003_0000,
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => 0,
        "SCMP_ACT_KILL_PROCESS" => 0x8000_0000,
        other => panic!("action {other}"),
    }
}

fn rules(profile: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut lines = vec![format!(
        "default {:x}",
        action(
            &text(&profile["defaultAction"]),
            profile["defaultErrnoRet"].as_u64()
        )
    )];
    for architecture in profile["architectures"].as_array().into_iter().flatten() {
        let token: u32 = match architecture.as_str() {
            Some("SCMP_ARCH_X86_64") => X86_64,
            Some("SCMP_ARCH_X86") => I386,
            // AUDIT_ARCH_X86_64 without its 64-bit mark: libseccomp's own token.
            Some("SCMP_ARCH_X32") => 0x4000_003E,
            other => panic!("architecture {other:?}"),
        };
        lines.push(format!("arch {token:x}"));
    }
    for entry in profile["syscalls"].as_array().into_iter().flatten() {
        let conditions: Vec<(u64, String)> = entry["args"]
            .as_array()
            .into_iter()
            .flatten()
            .map(condition)
            .collect();
        let action = action(&text(&entry["action"]), entry["errnoRet"].as_u64());
        // runc: with two conditions on one argument each becomes a rule of its own.
        let mut indexes: Vec<u64> = conditions.iter().map(|c| c.0).collect();
        indexes.sort_unstable();
        indexes.dedup();
        let apart = indexes.len() < conditions.len();
        for name in entry["names"].as_array().into_iter().flatten() {
            let name = text(name);
            if apart {
                lines.extend(
                    conditions
                        .iter()
                        .map(|c| format!("rule {action:x} {name} {}", c.1)),
                );
            } else {
                let all: Vec<&str> = conditions.iter().map(|c| c.1.as_str()).collect();
                lines.push(format!("rule {action:x} {name} {}", all.join(" ")));
            }
        }
    }
    lines.join("\n") + "\n"
}

/// A condition's argument, and how it is told to the compiler.
fn condition(value: &Value) -> (u64, String) {
    const OPERATORS: [&str; 7] = ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"];
    let name = value["op"].as_str().unwrap_or_default();
    let op = OPERATORS
        .iter()
        .position(|o| name.strip_prefix("SCMP_CMP_") == Some(o));
    let op = op.unwrap_or_else(|| panic!("operator {name}")) + 1;
    let number = |member: &str| value[member].as_u64().unwrap_or(0);
    let index = number("index");
    (
        index,
        format!(
            "{index:x} {op:x} {:x} {:x}",
            number("value"),
            number("valueTwo")
        ),
    )
}

/// Compiles a profile; an error when libseccomp refuses it.
pub(crate) fn compile(profile: &Value) -> Result<Filter, String> {
    let mut child = Command::new(compiler())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("run the compiler");
    let mut input = child.stdin.take().expect("its input");
    // It stops reading where it refuses.
    let _ = input.write_all(rules(profile).as_bytes());
    drop(input);
    let output = child.wait_with_output().expect("wait for the compiler");
    if output.status.code() == Some(3) {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    assert!(output.status.success(), "{output:?}");
    let (instructions, rest) = output.stdout.as_chunks::<8>();
    assert!(rest.is_empty() && !instructions.is_empty());
    let instruction = |bytes: &[u8; 8]| {
        let [c0, c1, yes, no, k0, k1, k2, k3] = *bytes;
        Instruction {
            code: u16::from_ne_bytes([c0, c1]),
            yes,
            no,
            k: u32::from_ne_bytes([k0, k1, k2, k3]),
        }
    };
    Ok(Filter(instructions.iter().map(instruction).collect()))
}
