//! Which containerd is calling.
//!
//! What a shim answers to `start` depends on it: 1.7 takes JSON of version 2 at most, 2.0 to 2.2 take version 3, and both
//! say `MAX_SHIM_VERSION=2`. They differ in the module path that the Go linker writes into the binary's section
//! `.go.buildinfo` (Go's debug/buildinfo); reading that costs a few small reads, running the binary a process.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The module of containerd since 2.0; also a dependency of programs that contain it.
const MODULE: &str = "github.com/containerd/containerd/v2";

const SECTION: &str = ".go.buildinfo";

/// How much of a table is looked at, in bytes: more than any binary has.
const MAX_TABLE: u64 = 1 << 20;

/// Whether the containerd in file `binary` knows version 3 of the protocol. False when that cannot be found out: every
/// version knows the older one.
pub fn knows_version_3(binary: &Path) -> bool {
    File::open(binary)
        .and_then(|file| build_info(&file))
        .is_ok_and(|info| names_module(&info))
}

fn names_module(info: &str) -> bool {
    info.match_indices(MODULE).any(|(at, _)| {
        let before = info[..at].chars().next_back();
        let behind = info[at + MODULE.len()..].chars().next();
        before.is_none_or(char::is_whitespace)
            && behind.is_none_or(|next| next == '/' || next.is_whitespace())
    })
}

/// Text of the modules that a Go program was built from.
fn build_info(file: &File) -> io::Result<String> {
    let (offset, size) = find_section(file)?;
    let blob = read(file, offset, size)?;
    // 14 bytes of magic, the pointer size, flags: the second bit says that the texts follow, behind 32 bytes.
    if blob.first_chunk() != Some(b"\xff Go buildinf:")
        || blob.get(15).is_none_or(|flags| flags & 2 == 0)
    {
        return Err(malformed("build information"));
    }
    let mut rest = blob.get(32..).unwrap_or_default();
    let _version = take_text(&mut rest)?;
    let modules = take_text(&mut rest)?;
    // Between two marks of 16 bytes.
    let modules = modules
        .get(16..modules.len().saturating_sub(16))
        .unwrap_or_default();
    Ok(String::from_utf8_lossy(modules).into_owned())
}

/// A length as a varint, and as many bytes.
fn take_text<'a>(rest: &mut &'a [u8]) -> io::Result<&'a [u8]> {
    let mut length = 0usize;
    for shift in (0..35).step_by(7) {
        let (&byte, behind) = rest
            .split_first()
            .ok_or_else(|| malformed("length of a text"))?;
        *rest = behind;
        length |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            let (text, behind) = rest
                .split_at_checked(length)
                .ok_or_else(|| malformed("text"))?;
            *rest = behind;
            return Ok(text);
        }
    }
    Err(malformed("length of a text"))
}

/// Offset and size of the section in an ELF file of 64 bits, little-endian (elf(5)).
fn find_section(file: &File) -> io::Result<(u64, u64)> {
    let header = read(file, 0, 64)?;
    if header.first_chunk() != Some(b"\x7fELF\x02\x01") {
        return Err(malformed("ELF header"));
    }
    let table = u64_at(&header, 0x28)?;
    let (entry, count, names) = (
        u16_at(&header, 0x3a)?,
        u16_at(&header, 0x3c)?,
        u16_at(&header, 0x3e)?,
    );
    let section = |index: u16| read(file, table + u64::from(entry) * u64::from(index), 64);
    let names = section(names)?;
    let names = read(file, u64_at(&names, 0x18)?, u64_at(&names, 0x20)?)?;
    for index in 0..count {
        let section = section(index)?;
        let name = names
            .get(u32_at(&section, 0)? as usize..)
            .unwrap_or_default();
        if name
            .strip_prefix(SECTION.as_bytes())
            .is_some_and(|rest| rest.first() == Some(&0))
        {
            return Ok((u64_at(&section, 0x18)?, u64_at(&section, 0x20)?));
        }
    }
    Err(malformed("section of a Go program"))
}

fn read(file: &File, offset: u64, size: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(size.min(MAX_TABLE)).unwrap_or(0)];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("no {what} where it is expected"),
    )
}

macro_rules! little_endian {
    ($($name:ident $kind:ty;)*) => {
        $(fn $name(bytes: &[u8], at: usize) -> io::Result<$kind> {
            let field = bytes.get(at..).and_then(|rest| rest.first_chunk()).ok_or_else(|| malformed("number"))?;
            Ok(<$kind>::from_le_bytes(*field))
        })*
    };
}

little_endian! {
    u16_at u16;
    u32_at u32;
    u64_at u64;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest ELF file that says what a Go program says: header, two sections' headers, their contents.
    fn program(modules: &str) -> Vec<u8> {
        let mut info = b"\xff Go buildinf:\x08\x02".to_vec();
        info.resize(32, 0);
        for text in [
            "go1.24.4".to_owned(),
            format!("{0}{modules}{0}", "0123456789abcdef"),
        ] {
            let length = text.len();
            info.extend([(length & 0x7f) as u8 | 0x80, (length >> 7) as u8]);
            info.extend(text.bytes());
        }
        let names = b"\0.go.buildinfo\0.shstrtab\0";
        let (table, first) = (64u64, 64 + 3 * 64u64);
        let mut file = b"\x7fELF\x02\x01".to_vec();
        file.resize(64, 0);
        file[0x28..0x30].copy_from_slice(&table.to_le_bytes());
        file[0x3a..0x3c].copy_from_slice(&64u16.to_le_bytes());
        file[0x3c..0x3e].copy_from_slice(&3u16.to_le_bytes());
        file[0x3e..0x40].copy_from_slice(&2u16.to_le_bytes());
        let sections = [
            (0u32, 0, 0),
            (1, first, info.len() as u64),
            (15, first + info.len() as u64, names.len() as u64),
        ];
        for (name, offset, size) in sections {
            let mut section = vec![0; 64];
            section[..4].copy_from_slice(&name.to_le_bytes());
            section[0x18..0x20].copy_from_slice(&offset.to_le_bytes());
            section[0x20..0x28].copy_from_slice(&size.to_le_bytes());
            file.extend(section);
        }
        file.extend(info);
        file.extend(names);
        file
    }

    fn asks(program: &[u8]) -> bool {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("containerd");
        std::fs::write(&path, program).expect("write");
        knows_version_3(&path)
    }

    #[test]
    fn the_module_tells_the_generation() {
        assert!(asks(&program(
            "path\tgithub.com/containerd/containerd/v2/cmd/containerd\nmod\tgithub.com/containerd/containerd/v2\tv2.1.4\n"
        )));
        assert!(asks(&program(
            "path\tgithub.com/k3s-io/k3s/cmd/server\ndep\tgithub.com/containerd/containerd/v2\tv2.0.5\n"
        )));
        assert!(!asks(&program(
            "path\tgithub.com/containerd/containerd/cmd/containerd\ndep\tgithub.com/containerd/containerd/v22\tv1\n"
        )));
        assert!(!asks(&program(
            "dep\texample.com/github.com/containerd/containerd/v2\tv1\n"
        )));
    }

    #[test]
    fn what_is_no_go_program_does_not_know_it() {
        assert!(!asks(b""));
        assert!(!asks(b"#!/bin/sh\n"));
        let whole = program("path\tgithub.com/containerd/containerd/v2/cmd/containerd\n");
        for length in 0..whole.len() - 1 {
            assert!(!asks(&whole[..length]), "cut at {length}");
        }
        assert!(!knows_version_3(Path::new("/nonexistent")));
        assert!(!knows_version_3(
            &std::env::current_exe().expect("this test")
        ));
    }
}
