//! Open uploads: each a file that grows, hashed as it does. They outlive the server; they end when they are finished or
//! cancelled, or after a day of silence.
//!
//! ```text
//! uploads/ID.name    the repository; while this is there, the upload is
//! uploads/ID         what has come of it
//! ```
//! Nothing is synced before an upload is finished: after a power cut the client is told how much is left, and the
//! digest at the end decides.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use protocol::ids::Digest;
use sha2::{Digest as _, Sha256};

use super::route::is_repository;

/// Most uploads that are open at a time.
const MAX_UPLOADS: usize = 1024;
/// An upload that nobody has written to for so long is forgotten.
const MAX_SILENCE: Duration = Duration::from_secs(24 * 3600);
/// The same, when there are too many.
const CROWDED_SILENCE: Duration = Duration::from_secs(3600);
/// Bytes that are read at a time when an upload is hashed again.
const BUFFER: usize = 1 << 20;
/// Bytes of an id: half as many as its digits.
const ID_BYTES: usize = 16;

/// One open upload.
#[derive(Debug)]
pub(super) struct Upload {
    pub(super) repository: String,
    pub(super) path: PathBuf,
    pub(super) size: u64,
    /// `None` until it is needed, for an upload from before the server started.
    hash: Option<Sha256>,
    touched: SystemTime,
    /// Set once it has ended: a request that waited for it finds nothing to write to.
    pub(super) ended: bool,
}

impl Upload {
    /// Adds bytes at the end.
    pub(super) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.touched = SystemTime::now();
        let mut hash = self.hash()?;
        let mut file = self.open()?;
        if let Err(error) = file.write_all(bytes) {
            // What reached the file of these bytes is not in the hash.
            file.set_len(self.size)?;
            self.hash = Some(hash);
            return Err(error);
        }
        hash.update(bytes);
        self.hash = Some(hash);
        self.size += bytes.len() as u64;
        Ok(())
    }

    /// Goes back to an earlier size: a chunk was not what its header said.
    pub(super) fn truncate(&mut self, size: u64) -> io::Result<()> {
        self.open()?.set_len(size)?;
        self.size = size;
        self.hash = None;
        Ok(())
    }

    /// The digest of what is there.
    pub(super) fn digest(&mut self) -> io::Result<Digest> {
        let hash = self.hash()?;
        self.hash = Some(hash.clone());
        Ok(Digest(hash.finalize().into()))
    }

    /// The file, which is made where nothing has come yet.
    pub(super) fn open(&self) -> io::Result<File> {
        File::options().append(true).create(true).open(&self.path)
    }

    fn hash(&mut self) -> io::Result<Sha256> {
        if let Some(hash) = self.hash.take() {
            return Ok(hash);
        }
        let mut hash = Sha256::new();
        if self.size == 0 {
            return Ok(hash);
        }
        let mut left = File::open(&self.path)?.take(self.size);
        let mut buffer = vec![0; BUFFER];
        loop {
            match left.read(&mut buffer)? {
                0 if left.limit() > 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                0 => return Ok(hash),
                read => hash.update(buffer.get(..read).unwrap_or_default()),
            }
        }
    }
}

/// An upload that one request at a time may write to.
pub(super) type Shared = Arc<tokio::sync::Mutex<Upload>>;

/// All open uploads.
#[derive(Debug)]
pub(super) struct Uploads {
    dir: PathBuf,
    open: Mutex<HashMap<String, Shared>>,
}

impl Uploads {
    /// The uploads that a directory holds. Files of none are removed.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let mut open = HashMap::new();
        let mut files = Vec::new();
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            match id_of(&path) {
                Some(id) => {
                    let upload = read(&path, dir.join(&id))?;
                    open.insert(id, Arc::new(tokio::sync::Mutex::new(upload)));
                }
                None => files.push(path),
            }
        }
        for path in files {
            let name = path.file_name().and_then(|name| name.to_str());
            if path.is_file() && !name.is_some_and(|name| open.contains_key(name)) {
                fs::remove_file(path)?;
            }
        }
        Ok(Self { dir: dir.to_owned(), open: Mutex::new(open) })
    }

    /// Opens an upload; `None` when there are too many.
    pub(super) fn begin(&self, repository: &str) -> io::Result<Option<String>> {
        let crowded = self.len() >= MAX_UPLOADS;
        self.expire(if crowded { CROWDED_SILENCE } else { MAX_SILENCE });
        if self.len() >= MAX_UPLOADS {
            return Ok(None);
        }
        let id = random_hex::<ID_BYTES>()?;
        let path = self.dir.join(&id);
        let mut name = File::create_new(self.name_path(&id))?;
        name.write_all(repository.as_bytes())?;
        let upload = Upload {
            repository: repository.to_owned(),
            path,
            size: 0,
            hash: Some(Sha256::new()),
            touched: SystemTime::now(),
            ended: false,
        };
        self.lock().insert(id.clone(), Arc::new(tokio::sync::Mutex::new(upload)));
        Ok(Some(id))
    }

    pub(super) fn get(&self, id: &str) -> Option<Shared> {
        self.lock().get(id).cloned()
    }

    /// Ends an upload that the caller has locked, and removes what is left of its files.
    pub(super) fn end(&self, id: &str, upload: &mut Upload) {
        upload.ended = true;
        self.lock().remove(id);
        let _ = fs::remove_file(self.name_path(id));
        let _ = fs::remove_file(&upload.path);
    }

    /// Forgets the uploads that have been silent for too long.
    pub(super) fn expire_old(&self) {
        self.expire(MAX_SILENCE);
    }

    fn expire(&self, silence: Duration) {
        let all: Vec<(String, Shared)> =
            self.lock().iter().map(|(id, upload)| (id.clone(), Arc::clone(upload))).collect();
        for (id, upload) in all {
            // One that is being written to is not silent.
            if let Ok(mut upload) = upload.try_lock()
                && upload.touched.elapsed().is_ok_and(|silent| silent > silence)
            {
                self.end(&id, &mut upload);
            }
        }
    }

    fn len(&self) -> usize {
        self.lock().len()
    }

    fn name_path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.name"))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Shared>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The id of an upload by the path of its name file.
fn id_of(path: &Path) -> Option<String> {
    let id = path.file_name()?.to_str()?.strip_suffix(".name")?;
    let good = id.len() == 2 * ID_BYTES && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    let name = fs::read_to_string(path).ok()?;
    (good && is_repository(&name)).then(|| id.to_owned())
}

fn read(name: &Path, path: PathBuf) -> io::Result<Upload> {
    let (size, touched) = match fs::metadata(&path) {
        Ok(meta) => (meta.len(), meta.modified()?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            (0, fs::metadata(name)?.modified()?)
        }
        Err(error) => return Err(error),
    };
    let repository = fs::read_to_string(name)?;
    Ok(Upload { repository, path, size, hash: None, touched, ended: false })
}

/// So many bytes from the system's random numbers, as hexadecimal digits.
pub(crate) fn random_hex<const N: usize>() -> io::Result<String> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set_age(path: &Path, age: Duration) {
        let file = File::options().append(true).open(path).expect("open");
        file.set_modified(SystemTime::now() - age).expect("set");
    }

    #[test]
    fn uploads_are_there_again_and_go_on_where_they_stood() {
        let dir = tempfile::tempdir().expect("dir");
        let uploads = Uploads::open(dir.path()).expect("open");
        let id = uploads.begin("a/b").expect("begin").expect("room");
        uploads.get(&id).expect("there").blocking_lock().append(b"abc").expect("append");
        fs::write(dir.path().join("ffff"), b"of nobody").expect("stray");
        let again = Uploads::open(dir.path()).expect("again");
        let upload = again.get(&id).expect("there again");
        let mut upload = upload.blocking_lock();
        assert_eq!((upload.repository.as_str(), upload.size), ("a/b", 3));
        upload.append(b"def").expect("append");
        assert_eq!(upload.digest().expect("digest"), Digest::of(b"abcdef"));
        upload.truncate(2).expect("truncate");
        assert_eq!(upload.digest().expect("digest"), Digest::of(b"ab"));
        assert!(!dir.path().join("ffff").exists());
        again.end(&id, &mut upload);
        assert!(again.get(&id).is_none());
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 0);
    }

    #[test]
    fn a_day_of_silence_ends_an_upload_over_restarts_too() {
        let dir = tempfile::tempdir().expect("dir");
        let uploads = Uploads::open(dir.path()).expect("open");
        let old = uploads.begin("a").expect("begin").expect("room");
        let young = uploads.begin("a").expect("begin").expect("room");
        for (id, age) in [(&old, MAX_SILENCE + CROWDED_SILENCE), (&young, CROWDED_SILENCE * 2)] {
            uploads.get(id).expect("there").blocking_lock().append(b"x").expect("append");
            set_age(&dir.path().join(id), age);
        }
        let again = Uploads::open(dir.path()).expect("again");
        again.expire_old();
        assert!(again.get(&old).is_none() && again.get(&young).is_some());
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 2);
        again.expire(CROWDED_SILENCE);
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 0);
    }

    #[test]
    fn too_many_open_uploads_are_refused() {
        let dir = tempfile::tempdir().expect("dir");
        let uploads = Uploads::open(dir.path()).expect("open");
        for _ in 0..MAX_UPLOADS {
            assert!(uploads.begin("a").expect("begin").is_some());
        }
        assert_eq!(uploads.begin("a").expect("begin"), None);
    }
}
