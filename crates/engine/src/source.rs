//! A C `FILE` over any Rust reader, so that llama.cpp loads a model that lies in no file.
//!
//! The C library calls back for bytes; [`Source`] owns the reader and answers. A reader that fails or panics ends the
//! load: its error is kept in the source, C sees a read error. `fopencookie` does it on Linux, `funopen` on macOS.

use std::io::{self, Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Bytes at positions: a file, a cursor, a stage view.
pub trait ReadSeek: Read + Seek {}

impl<T: Read + Seek + ?Sized> ReadSeek for T {}

/// The reader behind a `FILE`.
pub(crate) struct Source {
    reader: Box<dyn ReadSeek + Send>,
    n_bytes: u64,
    /// Where C reads next.
    position: u64,
    /// Where the reader stands, if that is known.
    reader_at: Option<u64>,
    /// Why the reader failed first.
    pub(crate) failure: Option<io::Error>,
}

impl Source {
    pub(crate) fn new(reader: Box<dyn ReadSeek + Send>, n_bytes: u64) -> Self {
        Self { reader, n_bytes, position: 0, reader_at: None, failure: None }
    }

    /// Reads up to `buffer.len()` bytes; 0 at the end, `None` after a failure.
    fn read(&mut self, buffer: &mut [u8]) -> Option<usize> {
        if self.failure.is_some() {
            return None;
        }
        let left = self.n_bytes.saturating_sub(self.position);
        let n = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        if n == 0 {
            return Some(0);
        }
        let read = catch_unwind(AssertUnwindSafe(|| self.read_some(&mut buffer[..n])))
            .unwrap_or_else(|_| Err(io::Error::other("the reader of the model panicked")));
        match read {
            Ok(n) => {
                self.position += n as u64;
                self.reader_at = Some(self.position);
                Some(n)
            }
            Err(error) => {
                self.failure = Some(error);
                None
            }
        }
    }

    fn read_some(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.reader_at.take() != Some(self.position) {
            self.reader.seek(SeekFrom::Start(self.position))?;
        }
        loop {
            match self.reader.read(buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) if n > buffer.len() => return Err(io::Error::other("the reader claims more bytes than fit")),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }

    /// Goes back to the start, for a file to be opened again.
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    pub(crate) fn rewind(&mut self) {
        self.position = 0;
    }

    /// Moves as `fseek` does; `whence` is 0, 1 or 2. `None` if that is before the start.
    fn seek(&mut self, offset: i64, whence: i32) -> Option<u64> {
        let base = match whence {
            0 => 0,
            1 => self.position,
            2 => self.n_bytes,
            _ => return None,
        };
        self.position = base.checked_add_signed(offset).filter(|position| i64::try_from(*position).is_ok())?;
        Some(self.position)
    }

    /// Calls `load` with a `FILE` over this source, which is closed afterwards. `None` if none could be made.
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    pub(crate) fn with_file<R>(&mut self, load: impl FnOnce(*mut std::ffi::c_void) -> R) -> Option<R> {
        let file = ffi::OpenFile::over(self)?;
        Some(load(file.as_ptr()))
    }

    /// All bytes in a temporary file, where the C library cannot call back.
    #[cfg(not(any(target_os = "linux", target_os = "macos")))]
    pub(crate) fn spool(&mut self) -> io::Result<tempfile::NamedTempFile> {
        let mut file = tempfile::NamedTempFile::new()?;
        self.reader.seek(SeekFrom::Start(0))?;
        let copied = io::copy(&mut (&mut *self.reader).take(self.n_bytes), &mut file)?;
        if copied == self.n_bytes { Ok(file) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

#[cfg(any(target_os = "linux", target_os = "macos"))]
mod ffi {
    use std::ffi::{c_char, c_int, c_void};
    use std::marker::PhantomData;
    use std::ptr::{self, NonNull};
    use std::slice;

    use super::Source;

    /// A `FILE` that borrows a source until it is closed, which dropping does.
    pub(super) struct OpenFile<'a> {
        file: NonNull<c_void>,
        source: PhantomData<&'a mut Source>,
    }

    impl<'a> OpenFile<'a> {
        pub(super) fn over(source: &'a mut Source) -> Option<Self> {
            let file = NonNull::new(open(ptr::from_mut(source).cast()))?;
            Some(Self { file, source: PhantomData })
        }

        pub(super) fn as_ptr(&self) -> *mut c_void {
            self.file.as_ptr()
        }
    }

    impl Drop for OpenFile<'_> {
        fn drop(&mut self) {
            // SAFETY: the pointer came from `open`, and nobody else closes it: llama.cpp borrows the files it is given.
            unsafe { fclose(self.file.as_ptr()) };
        }
    }

    unsafe extern "C" {
        fn fclose(file: *mut c_void) -> c_int;
    }

    /// Fills `buffer` from the source.
    ///
    /// # Safety
    /// - `cookie` is the source of an open [`OpenFile`], and nobody else uses it during the call.
    /// - `buffer` is writable for `n` bytes.
    unsafe fn fill(cookie: *mut c_void, buffer: *mut c_char, n: usize) -> isize {
        // SAFETY: by the contract of this function.
        let source = unsafe { &mut *cookie.cast::<Source>() };
        // SAFETY: the same; C's buffer may be uninitialised, so it is written before a slice refers to it.
        let buffer = unsafe {
            ptr::write_bytes(buffer, 0, n);
            slice::from_raw_parts_mut(buffer.cast::<u8>(), n)
        };
        source.read(buffer).map_or(-1, |n| n as isize)
    }

    #[cfg(target_os = "linux")]
    fn open(cookie: *mut c_void) -> *mut c_void {
        #[repr(C)]
        struct Functions {
            read: Option<unsafe extern "C" fn(*mut c_void, *mut c_char, usize) -> isize>,
            write: Option<unsafe extern "C" fn(*mut c_void, *const c_char, usize) -> isize>,
            seek: Option<unsafe extern "C" fn(*mut c_void, *mut i64, c_int) -> c_int>,
            close: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
        }
        unsafe extern "C" {
            fn fopencookie(cookie: *mut c_void, mode: *const c_char, functions: Functions) -> *mut c_void;
        }
        unsafe extern "C" fn read(cookie: *mut c_void, buffer: *mut c_char, n: usize) -> isize {
            // SAFETY: stdio passes the cookie of the open file and a buffer of `n` bytes.
            unsafe { fill(cookie, buffer, n) }
        }
        unsafe extern "C" fn seek(cookie: *mut c_void, offset: *mut i64, whence: c_int) -> c_int {
            // SAFETY: stdio passes the cookie of the open file and a valid offset to read and to replace.
            let (source, offset) = unsafe { (&mut *cookie.cast::<Source>(), &mut *offset) };
            let Some(position) = source.seek(*offset, whence) else { return -1 };
            *offset = position as i64;
            0
        }
        let functions = Functions { read: Some(read), write: None, seek: Some(seek), close: None };
        // SAFETY: the mode is a C string, the functions follow the signatures of `cookie_io_functions_t`, and
        // `OpenFile` keeps the cookie borrowed until the file is closed.
        unsafe { fopencookie(cookie, c"rb".as_ptr(), functions) }
    }

    #[cfg(target_os = "macos")]
    fn open(cookie: *mut c_void) -> *mut c_void {
        type ReadFn = unsafe extern "C" fn(*mut c_void, *mut c_char, c_int) -> c_int;
        type WriteFn = unsafe extern "C" fn(*mut c_void, *const c_char, c_int) -> c_int;
        type SeekFn = unsafe extern "C" fn(*mut c_void, i64, c_int) -> i64;
        type CloseFn = unsafe extern "C" fn(*mut c_void) -> c_int;
        unsafe extern "C" {
            fn funopen(
                cookie: *const c_void,
                read: Option<ReadFn>,
                write: Option<WriteFn>,
                seek: Option<SeekFn>,
                close: Option<CloseFn>,
            ) -> *mut c_void;
        }
        unsafe extern "C" fn read(cookie: *mut c_void, buffer: *mut c_char, n: c_int) -> c_int {
            let Ok(n) = usize::try_from(n) else { return -1 };
            // SAFETY: stdio passes the cookie of the open file and a buffer of `n` bytes. The result is at most `n`.
            unsafe { fill(cookie, buffer, n) as c_int }
        }
        unsafe extern "C" fn seek(cookie: *mut c_void, offset: i64, whence: c_int) -> i64 {
            // SAFETY: stdio passes the cookie of the open file.
            let source = unsafe { &mut *cookie.cast::<Source>() };
            source.seek(offset, whence).map_or(-1, |position| position as i64)
        }
        // SAFETY: the functions follow the signatures of `funopen`, and `OpenFile` keeps the cookie borrowed until the
        // file is closed.
        unsafe { funopen(cookie, Some(read), None, Some(seek), None) }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    #[test]
    fn reads_and_seeks_like_a_file() {
        let mut source = Source::new(Box::new(Cursor::new((0..100u8).collect::<Vec<_>>())), 90);
        let mut buffer = [0; 4];
        assert_eq!((source.seek(-4, 2), source.read(&mut buffer), buffer), (Some(86), Some(4), [86, 87, 88, 89]));
        assert_eq!(source.read(&mut buffer), Some(0), "bytes behind n_bytes do not exist");
        assert_eq!((source.seek(-80, 1), source.read(&mut buffer), buffer), (Some(10), Some(4), [10, 11, 12, 13]));
        assert_eq!((source.seek(-1, 0), source.seek(0, 7)), (None, None));
    }

    #[test]
    fn a_short_or_panicking_reader_is_a_failure() {
        let mut source = Source::new(Box::new(Cursor::new(vec![1; 10])), 90);
        let mut buffer = [0; 20];
        assert_eq!(
            (source.read(&mut buffer), source.read(&mut buffer), source.read(&mut buffer)),
            (Some(10), None, None)
        );
        assert_eq!(source.failure.unwrap().kind(), io::ErrorKind::UnexpectedEof);

        struct Panics;
        impl Read for Panics {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                panic!("on purpose")
            }
        }
        impl Seek for Panics {
            fn seek(&mut self, _: SeekFrom) -> io::Result<u64> {
                Ok(0)
            }
        }
        let mut source = Source::new(Box::new(Panics), 90);
        assert_eq!(source.read(&mut buffer), None);
        assert!(source.failure.unwrap().to_string().contains("panicked"));
    }
}
