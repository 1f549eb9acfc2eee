//! Storages that fail on purpose, to show what the checkpoint protocol survives.
//!
//! [`Faulty`] wraps a storage and lets its `k`-th operation fail. [`PowerCut`] is a storage in
//! memory that keeps apart what was written and what would still be there after a power cut at its
//! `k`-th operation: contents without fsync come back empty, cut short, with holes or whole, and
//! names without fsync of their folder come back or not, each by itself.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{self, Cursor, Error, ErrorKind, Read};
use std::path::{Component, Path};

use diffusion_ops::rng::{Key, stream};

use super::storage::Storage;

/// How an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No space left on the device (`ENOSPC`).
    NoSpace,
    /// The device reports an error (`EIO`).
    Device,
    /// The file system is mounted read-only (`EROFS`).
    ReadOnly,
    /// Half of the bytes are written, then the device is full. Other operations fail whole.
    ShortWrite,
}

impl Fault {
    fn error(self) -> Error {
        match self {
            Self::NoSpace | Self::ShortWrite => Error::from_raw_os_error(28),
            Self::Device => Error::from_raw_os_error(5),
            Self::ReadOnly => Error::from_raw_os_error(30),
        }
    }
}

/// A storage whose operation number `at` (from 0) fails once; with `at = u64::MAX` it only counts.
#[derive(Debug)]
pub struct Faulty<S> {
    inner: S,
    at: u64,
    fault: Fault,
    count: std::sync::Arc<std::sync::atomic::AtomicU64>,
}

impl<S: Storage> Faulty<S> {
    /// Wraps `inner`.
    pub fn new(inner: S, at: u64, fault: Fault) -> Self {
        Self {
            inner,
            at,
            fault,
            count: Default::default(),
        }
    }

    /// The number of operations so far, readable after the storage has been given away.
    pub fn counter(&self) -> std::sync::Arc<std::sync::atomic::AtomicU64> {
        self.count.clone()
    }

    fn next(&self) -> io::Result<()> {
        let now = self.count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        if now == self.at {
            Err(self.fault.error())
        } else {
            Ok(())
        }
    }
}

impl<S: Storage> Storage for Faulty<S> {
    fn create_dir(&mut self, path: &Path) -> io::Result<()> {
        self.next()?;
        self.inner.create_dir(path)
    }
    fn create(&mut self, path: &Path) -> io::Result<()> {
        self.next()?;
        self.inner.create(path)
    }
    fn append(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        if let Err(error) = self.next() {
            if self.fault == Fault::ShortWrite {
                self.inner.append(path, &bytes[..bytes.len() / 2])?;
            }
            return Err(error);
        }
        self.inner.append(path, bytes)
    }
    fn sync_file(&mut self, path: &Path) -> io::Result<()> {
        self.next()?;
        self.inner.sync_file(path)
    }
    fn sync_dir(&mut self, path: &Path) -> io::Result<()> {
        self.next()?;
        self.inner.sync_dir(path)
    }
    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        self.next()?;
        self.inner.rename(from, to)
    }
    fn remove_file(&mut self, path: &Path) -> io::Result<()> {
        self.next()?;
        self.inner.remove_file(path)
    }
    fn remove_dir(&mut self, path: &Path) -> io::Result<()> {
        self.next()?;
        self.inner.remove_dir(path)
    }
    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.next()?;
        self.inner.list(path)
    }
    fn read(&self, path: &Path) -> io::Result<(Box<dyn Read + '_>, u64)> {
        self.next()?;
        self.inner.read(path)
    }
}

/// A number by which a file or folder is known while it is renamed.
type Inode = usize;

#[derive(Clone, Debug)]
enum Node {
    File {
        live: Vec<u8>,
        durable: Vec<u8>,
        dirty: bool,
    },
    Folder {
        live: BTreeMap<String, Inode>,
        durable: BTreeMap<String, Inode>,
        log: Vec<Change>,
    },
}

impl Node {
    fn folder(names: BTreeMap<String, Inode>) -> Self {
        Self::Folder {
            live: names.clone(),
            durable: names,
            log: Vec::new(),
        }
    }
}

/// A change of a folder's names that is not durable yet.
#[derive(Clone, Debug)]
enum Change {
    Link(String, Inode),
    Unlink(String),
    Rename(String, String, Inode),
}

impl Change {
    fn apply(self, names: &mut BTreeMap<String, Inode>) {
        match self {
            Self::Link(name, node) => {
                names.insert(name, node);
            }
            Self::Unlink(name) => {
                names.remove(&name);
            }
            Self::Rename(from, to, node) => {
                names.remove(&from);
                names.insert(to, node);
            }
        }
    }
}

/// A file system in memory that loses power before its operation number `at` (from 0).
///
/// Clones share nothing: keep one aside with [`PowerCut::disk`] to look at what is left.
#[derive(Debug)]
pub struct PowerCut {
    disk: std::sync::Arc<std::sync::Mutex<Vec<Node>>>,
    at: u64,
    count: Cell<u64>,
}

/// What is in a [`PowerCut`], shared with whoever wants to look after it was given away.
#[derive(Clone, Debug)]
pub struct Disk(std::sync::Arc<std::sync::Mutex<Vec<Node>>>);

impl PowerCut {
    /// An empty file system that loses power before operation `at`; `u64::MAX` means never.
    pub fn new(at: u64) -> Self {
        let root = Node::folder(BTreeMap::new());
        Self {
            disk: std::sync::Arc::new(std::sync::Mutex::new(vec![root])),
            at,
            count: Cell::new(0),
        }
    }

    /// The same contents, seen from outside.
    pub fn disk(&self) -> Disk {
        Disk(self.disk.clone())
    }

    fn nodes(&self) -> io::Result<std::sync::MutexGuard<'_, Vec<Node>>> {
        let now = self.count.get();
        self.count.set(now + 1);
        if now >= self.at {
            return Err(Error::other("power cut"));
        }
        self.disk.lock().map_err(|_| Error::other("poisoned"))
    }
}

impl Disk {
    /// The file system as it comes back after the power cut: what was durable, and of the rest what
    /// `seed` chooses. It loses power again before operation `at`.
    pub fn recover(&self, seed: u64, at: u64) -> PowerCut {
        let key = Key::new(seed, stream::TEST);
        let nodes = match self.0.lock() {
            Ok(nodes) => nodes.clone(),
            Err(poisoned) => poisoned.into_inner().clone(),
        };
        let nodes = nodes
            .into_iter()
            .enumerate()
            .map(|(i, node)| after_power_cut(node, key.item(i as u64)))
            .collect();
        PowerCut {
            disk: std::sync::Arc::new(std::sync::Mutex::new(nodes)),
            at,
            count: Cell::new(0),
        }
    }

    /// The file system without a power cut: all that was written, as after a kill.
    pub fn reopen(&self, at: u64) -> PowerCut {
        let nodes = match self.0.lock() {
            Ok(nodes) => nodes.clone(),
            Err(poisoned) => poisoned.into_inner().clone(),
        };
        PowerCut {
            disk: std::sync::Arc::new(std::sync::Mutex::new(nodes)),
            at,
            count: Cell::new(0),
        }
    }
}

fn after_power_cut(node: Node, key: Key) -> Node {
    match node {
        Node::Folder {
            durable: mut names,
            log,
            ..
        } => {
            for (i, change) in log.into_iter().enumerate() {
                if key.step(i as u64).below(2) == 1 {
                    change.apply(&mut names);
                }
            }
            Node::folder(names)
        }
        Node::File {
            live,
            durable,
            dirty,
        } => {
            let bytes = match if dirty { key.below(5) } else { 0 } {
                0 => durable,
                1 => Vec::new(),
                2 => live[..key.step(1).below(live.len() as u64 + 1) as usize].to_vec(),
                3 => {
                    let mut holes = live;
                    for (i, block) in holes.chunks_mut(64).enumerate() {
                        if key.step(2 + i as u64).below(2) == 1 {
                            block.fill(0);
                        }
                    }
                    holes
                }
                _ => live,
            };
            Node::File {
                live: bytes.clone(),
                durable: bytes,
                dirty: false,
            }
        }
    }
}

fn parts(path: &Path) -> impl DoubleEndedIterator<Item = String> + '_ {
    path.components().filter_map(|c| match c {
        Component::Normal(name) => Some(name.to_string_lossy().into_owned()),
        _ => None,
    })
}

fn find(nodes: &[Node], path: &Path) -> io::Result<Inode> {
    let mut at = 0;
    for name in parts(path) {
        at = match &nodes[at] {
            Node::Folder { live, .. } => *live.get(&name).ok_or(ErrorKind::NotFound)?,
            Node::File { .. } => return Err(ErrorKind::NotADirectory.into()),
        };
    }
    Ok(at)
}

fn split(nodes: &[Node], path: &Path) -> io::Result<(Inode, String)> {
    let name = parts(path).next_back().ok_or(ErrorKind::InvalidInput)?;
    Ok((find(nodes, path.parent().unwrap_or(Path::new("")))?, name))
}

fn change(nodes: &mut [Node], folder: Inode, change: Change) -> io::Result<()> {
    match &mut nodes[folder] {
        Node::Folder { live, log, .. } => {
            change.clone().apply(live);
            log.push(change);
            Ok(())
        }
        Node::File { .. } => Err(ErrorKind::NotADirectory.into()),
    }
}

impl Storage for PowerCut {
    fn create_dir(&mut self, path: &Path) -> io::Result<()> {
        let mut nodes = self.nodes()?;
        let mut at = 0;
        for name in parts(path) {
            let Node::Folder { live, .. } = &nodes[at] else {
                return Err(ErrorKind::NotADirectory.into());
            };
            at = match live.get(&name) {
                Some(&node) => node,
                None => {
                    nodes.push(Node::folder(BTreeMap::new()));
                    let node = nodes.len() - 1;
                    change(&mut nodes, at, Change::Link(name, node))?;
                    node
                }
            };
        }
        Ok(())
    }

    fn create(&mut self, path: &Path) -> io::Result<()> {
        let mut nodes = self.nodes()?;
        let (folder, name) = split(&nodes, path)?;
        nodes.push(Node::File {
            live: Vec::new(),
            durable: Vec::new(),
            dirty: true,
        });
        let node = nodes.len() - 1;
        change(&mut nodes, folder, Change::Link(name, node))
    }

    fn append(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut nodes = self.nodes()?;
        let node = find(&nodes, path)?;
        let Node::File { live, dirty, .. } = &mut nodes[node] else {
            return Err(ErrorKind::IsADirectory.into());
        };
        live.extend_from_slice(bytes);
        *dirty = true;
        Ok(())
    }

    fn sync_file(&mut self, path: &Path) -> io::Result<()> {
        let mut nodes = self.nodes()?;
        let node = find(&nodes, path)?;
        let Node::File {
            live,
            durable,
            dirty,
        } = &mut nodes[node]
        else {
            return Err(ErrorKind::IsADirectory.into());
        };
        durable.clone_from(live);
        *dirty = false;
        Ok(())
    }

    fn sync_dir(&mut self, path: &Path) -> io::Result<()> {
        let mut nodes = self.nodes()?;
        let node = find(&nodes, path)?;
        let Node::Folder { live, durable, log } = &mut nodes[node] else {
            return Err(ErrorKind::NotADirectory.into());
        };
        durable.clone_from(live);
        log.clear();
        Ok(())
    }

    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let mut nodes = self.nodes()?;
        let node = find(&nodes, from)?;
        let (source, old) = split(&nodes, from)?;
        let (target, new) = split(&nodes, to)?;
        if source != target {
            return Err(ErrorKind::Unsupported.into());
        }
        change(&mut nodes, source, Change::Rename(old, new, node))
    }

    fn remove_file(&mut self, path: &Path) -> io::Result<()> {
        let mut nodes = self.nodes()?;
        let (folder, name) = split(&nodes, path)?;
        change(&mut nodes, folder, Change::Unlink(name))
    }

    fn remove_dir(&mut self, path: &Path) -> io::Result<()> {
        let mut nodes = self.nodes()?;
        let (folder, name) = split(&nodes, path)?;
        change(&mut nodes, folder, Change::Unlink(name))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let nodes = self.nodes()?;
        match &nodes[find(&nodes, path)?] {
            Node::Folder { live, .. } => Ok(live.keys().cloned().collect()),
            Node::File { .. } => Err(ErrorKind::NotADirectory.into()),
        }
    }

    fn read(&self, path: &Path) -> io::Result<(Box<dyn Read + '_>, u64)> {
        let nodes = self.nodes()?;
        match &nodes[find(&nodes, path)?] {
            Node::File { live, .. } => Ok((Box::new(Cursor::new(live.clone())), live.len() as u64)),
            Node::Folder { .. } => Err(ErrorKind::IsADirectory.into()),
        }
    }
}
