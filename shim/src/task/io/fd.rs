//! Pipes, fifos and terminals in the async runtime.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// One end of a pipe, a fifo or a terminal, non-blocking. Reading and writing need only `&self`.
#[derive(Debug)]
pub struct Stream(AsyncFd<File>);

impl Stream {
    /// Makes `fd` non-blocking and registers it for reading, writing or both.
    pub fn new(fd: OwnedFd, interest: Interest) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // Deprecated, because a type may give another descriptor each time it is asked, or close it early: a file does not.
        #[expect(
            deprecated,
            reason = "the replacement is unsafe, and unsafe code belongs into the kernel crate"
        )]
        let registered = AsyncFd::with_interest(File::from(fd), interest)?;
        Ok(Self(registered))
    }

    /// A pipe whose reading end is ours.
    pub fn pipe_to_us() -> io::Result<(Self, OwnedFd)> {
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        Ok((Self::new(read, Interest::READABLE)?, write))
    }

    /// A pipe whose writing end is ours.
    pub fn pipe_from_us() -> io::Result<(OwnedFd, Self)> {
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        Ok((read, Self::new(write, Interest::WRITABLE)?))
    }

    /// Opens a fifo for writing without waiting for a reader, and keeps it from breaking when the reader goes away:
    /// the descriptor is a reader too, so what is written waits in the fifo, at most its size.
    pub fn fifo_writer(path: &Path) -> io::Result<Self> {
        let file = open_nonblocking(OpenOptions::new().read(true).write(true), path)?;
        Self::new(file.into(), Interest::WRITABLE)
    }

    /// Opens a fifo for reading without waiting for a writer.
    pub fn fifo_reader(path: &Path) -> io::Result<Self> {
        let file = open_nonblocking(OpenOptions::new().read(true), path)?;
        Self::new(file.into(), Interest::READABLE)
    }

    /// Waits until there is something to read (or the end), and reads it. 0 is the end; so is the hang-up of a terminal.
    ///
    /// The buffer is made by `buffer` when there is something, so that an idle stream holds none.
    pub async fn read_with(&self, buffer: &mut Vec<u8>, size: usize) -> io::Result<usize> {
        loop {
            let mut ready = self.0.readable().await?;
            buffer.resize(size, 0);
            match ready.try_io(|fd| fd.get_ref().read(buffer)) {
                Ok(Ok(count)) => {
                    buffer.truncate(count);
                    return Ok(count);
                }
                // What a terminal's master says when the last slave is closed.
                Ok(Err(error)) if error.raw_os_error() == Some(nix::errno::Errno::EIO as i32) => {
                    buffer.clear();
                    return Ok(0);
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => *buffer = Vec::new(),
            }
        }
    }

    /// Reads what is there now, without waiting; None when there is nothing yet, `Some(0)` at the end.
    pub fn read_now(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match self.0.get_ref().read(buffer) {
            Ok(count) => Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes everything, waiting for room as long as it takes.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.0.writable().await?;
            match ready.try_io(|fd| fd.get_ref().write(bytes)) {
                Ok(Ok(count)) => bytes = &bytes[count..],
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.0.get_ref().as_raw_fd()
    }
}

/// Opens without waiting for the other end of a fifo.
pub(super) fn open_nonblocking(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    options.custom_flags(OFlag::O_NONBLOCK.bits()).open(path)
}

/// Whether `path` is a fifo; false also when there is nothing.
pub(super) fn is_fifo(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|metadata| metadata.file_type().is_fifo())
}
