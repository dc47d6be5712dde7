//! Capabilities of the calling thread (capabilities(7)).

use crate::Result;
use crate::sys::check;

/// `_LINUX_CAPABILITY_VERSION_3` of linux/capability.h: two words of 32.
const VERSION: u32 = 0x2008_0522;
/// `SECBIT_NOROOT`: exec gives root nothing.
const NO_ROOT: i32 = 1;

/// A capability by its number in linux/capability.h. Only those that this project names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs, reason = "their names are those of capabilities(7)")]
pub enum Capability {
    SetGid = 6,
    SetUid = 7,
    SetPcap = 8,
    NetBindService = 10,
    NetBroadcast = 11,
    NetRaw = 13,
    IpcOwner = 15,
    SysModule = 16,
    SysRawio = 17,
    SysPacct = 20,
    SysBoot = 22,
    SysTime = 25,
    SysTtyConfig = 26,
    Lease = 28,
    AuditWrite = 29,
    AuditControl = 30,
    Syslog = 34,
    WakeAlarm = 35,
    BlockSuspend = 36,
    AuditRead = 37,
    Perfmon = 38,
    Bpf = 39,
    CheckpointRestore = 40,
}

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Takes capabilities out of force for the calling thread and those that it starts from now on. A program that root executes
/// has them again, unless the process is set not to treat root like that.
///
/// They stay permitted: a program that gains permitted ones at its exec loses the signal of [`super::end_with_parent`]
/// (`commit_creds` in kernel/cred.c).
///
/// False: nothing was given up, because a program that this process executes would not have them again.
pub fn give_up(capabilities: &[Capability]) -> Result<bool> {
    // SAFETY: no pointers.
    let bits = unsafe { libc::prctl(libc::PR_GET_SECUREBITS, 0, 0, 0, 0) };
    let bits = check(bits, || "read the secure bits".to_owned())?;
    if bits & NO_ROOT != 0 || !nix::unistd::geteuid().is_root() {
        return Ok(false);
    }
    change(|number, sets| {
        if capabilities.iter().any(|c| *c as usize == number) {
            sets.effective &= !(1u32 << (number % 32));
        }
    })?;
    Ok(true)
}

/// Takes capabilities from the calling thread and those that it starts from now on, for good. A program that root executes has them
/// again all the same, but see [`give_up`] for what it loses by that.
pub fn drop_for_good(capabilities: &[Capability]) -> Result<()> {
    change(|number, sets| {
        if capabilities.iter().any(|c| *c as usize == number) {
            let others = !(1u32 << (number % 32));
            sets.effective &= others;
            sets.permitted &= others;
        }
    })
}

/// Brings all permitted capabilities into force for the calling thread alone: for one that does a single thing and ends.
pub fn take_up_in_this_thread() -> Result<()> {
    change(|number, sets| sets.effective |= sets.permitted & 1u32 << (number % 32))
}

/// Changes the sets of the calling thread, for each capability by its number.
fn change(mut edit: impl FnMut(usize, &mut Sets)) -> Result<()> {
    let mut header = Header {
        version: VERSION,
        pid: 0,
    };
    let mut sets = [Sets::default(); 2];
    // SAFETY: both live through the call, and version 3 fills two words.
    let answer = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) };
    check(answer, || "read the own capabilities".to_owned())?;
    for number in 0..64 {
        edit(number, &mut sets[number / 32]);
    }
    // SAFETY: both live through the call, and version 3 reads two words.
    let answer = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) };
    check(answer, || {
        "change which capabilities are in force".to_owned()
    })
    .map(drop)
}
