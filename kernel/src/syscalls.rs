//! Numbers of the trapped system calls by architecture.
//!
//! A 64-bit kernel runs 32-bit programs too, and their numbers differ: a notification is only to be read with its
//! `AUDIT_ARCH_*` in hand. On i386 a program may also reach bind, connect and listen through `socketcall`, whose
//! arguments lie in the caller's memory; libseccomp adds that call to a filter when the direct ones are named.

/// `AUDIT_ARCH_X86_64` (include/uapi/linux/audit.h), x32 included.
pub const ARCH_X86_64: u32 = 0xC000_003E;
/// `AUDIT_ARCH_I386`.
pub const ARCH_I386: u32 = 0x4000_0003;
/// `AUDIT_ARCH_AARCH64`.
pub const ARCH_AARCH64: u32 = 0xC000_00B7;
/// `AUDIT_ARCH_ARM`.
pub const ARCH_ARM: u32 = 0x4000_0028;

/// x32 programs carry this bit in their numbers and share the rest with x86-64 for these calls.
const X32_BIT: i32 = 0x4000_0000;

/// A system call that kbp traps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Syscall {
    /// bind(2).
    Bind,
    /// connect(2).
    Connect,
    /// listen(2).
    Listen,
    /// epoll_create(2).
    EpollCreate,
    /// epoll_create1(2).
    EpollCreate1,
}

impl Syscall {
    /// Every trapped call.
    pub const ALL: [Self; 5] = [
        Self::Bind,
        Self::Connect,
        Self::Listen,
        Self::EpollCreate,
        Self::EpollCreate1,
    ];

    /// Its name, as a seccomp profile writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bind => "bind",
            Self::Connect => "connect",
            Self::Listen => "listen",
            Self::EpollCreate => "epoll_create",
            Self::EpollCreate1 => "epoll_create1",
        }
    }

    /// Its number on an architecture; None where that architecture lacks it (aarch64 has no epoll_create) or is not known here.
    pub fn number(self, arch: u32) -> Option<i32> {
        let numbers = match arch {
            ARCH_X86_64 => [Some(49), Some(42), Some(50), Some(213), Some(291)],
            ARCH_I386 => [Some(361), Some(362), Some(363), Some(254), Some(329)],
            ARCH_AARCH64 => [Some(200), Some(203), Some(201), None, Some(20)],
            ARCH_ARM => [Some(282), Some(283), Some(284), Some(250), Some(357)],
            _ => [None; 5],
        };
        numbers[self as usize]
    }
}

/// Where the first argument of a trapped call, a socket's number or an epoll flag, is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirstArgument {
    /// Here.
    Value(i32),
    /// In the caller's memory, 32 bits at this address (`socketcall`): read it with [`crate::process::read_memory`].
    At(u64),
}

/// Which trapped call a notification tells of, and its first argument; None for any other call.
pub fn identify(arch: u32, number: i32, args: &[u64; 6]) -> Option<(Syscall, FirstArgument)> {
    const SOCKETCALL: i32 = 102;
    if arch == ARCH_I386 && number == SOCKETCALL {
        // include/uapi/linux/net.h
        let call = match args[0] as u32 {
            2 => Syscall::Bind,
            3 => Syscall::Connect,
            4 => Syscall::Listen,
            _ => return None,
        };
        return Some((call, FirstArgument::At(u64::from(args[1] as u32))));
    }
    let number = if arch == ARCH_X86_64 {
        number & !X32_BIT
    } else {
        number
    };
    let call = Syscall::ALL
        .into_iter()
        .find(|call| call.number(arch) == Some(number))?;
    // The kernel reads these arguments as int, whatever the upper half of the register holds.
    Some((call, FirstArgument::Value(args[0] as u32 as i32)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_this_machine_are_those_of_its_libc() {
        let (arch, numbers) = if cfg!(target_arch = "x86_64") {
            (
                ARCH_X86_64,
                [libc::SYS_bind, libc::SYS_connect, libc::SYS_listen],
            )
        } else {
            (
                ARCH_AARCH64,
                [libc::SYS_bind, libc::SYS_connect, libc::SYS_listen],
            )
        };
        for (call, number) in [Syscall::Bind, Syscall::Connect, Syscall::Listen]
            .into_iter()
            .zip(numbers)
        {
            assert_eq!(
                call.number(arch).map(i64::from),
                Some(number),
                "{}",
                call.name()
            );
        }
        assert_eq!(
            Syscall::EpollCreate1.number(arch).map(i64::from),
            Some(libc::SYS_epoll_create1)
        );
        #[cfg(target_arch = "x86_64")]
        assert_eq!(
            Syscall::EpollCreate.number(arch).map(i64::from),
            Some(libc::SYS_epoll_create)
        );
    }

    #[test]
    fn every_number_identifies_its_own_call() {
        for arch in [ARCH_X86_64, ARCH_I386, ARCH_AARCH64, ARCH_ARM] {
            for call in Syscall::ALL {
                let Some(number) = call.number(arch) else {
                    assert_eq!((arch, call), (ARCH_AARCH64, Syscall::EpollCreate));
                    continue;
                };
                let args = [7, 0, 0, 0, 0, 0];
                assert_eq!(
                    identify(arch, number, &args),
                    Some((call, FirstArgument::Value(7)))
                );
            }
        }
    }

    #[test]
    fn the_same_number_means_another_call_on_another_architecture() {
        let args = [3, 0, 0, 0, 0, 0];
        assert_eq!(
            identify(ARCH_X86_64, 50, &args).map(|c| c.0),
            Some(Syscall::Listen)
        );
        assert_eq!(identify(ARCH_I386, 50, &args), None);
        assert_eq!(identify(ARCH_AARCH64, 50, &args), None);
        assert_eq!(
            identify(0, 50, &args),
            None,
            "an architecture that is not known here"
        );
    }

    #[test]
    fn socketcall_points_into_the_memory_of_the_caller() {
        let args = [2, 0xffff_ffff_0804_9000, 0, 0, 0, 0];
        assert_eq!(
            identify(ARCH_I386, 102, &args),
            Some((Syscall::Bind, FirstArgument::At(0x0804_9000)))
        );
        assert_eq!(
            identify(ARCH_I386, 102, &[1, 0x0804_9000, 0, 0, 0, 0]),
            None,
            "socket()"
        );
        assert_eq!(identify(ARCH_X86_64, 102, &args), None, "getuid on x86-64");
    }

    #[test]
    fn x32_programs_and_dirty_upper_halves_are_read() {
        let args = [0xdead_beef_0000_0005, 0, 0, 0, 0, 0];
        assert_eq!(
            identify(ARCH_X86_64, 49 | X32_BIT, &args),
            Some((Syscall::Bind, FirstArgument::Value(5)))
        );
    }
}
