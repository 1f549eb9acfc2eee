//! The stack machine of Python's pickle, reduced to what a dictionary of tensors needs.

use std::collections::BTreeMap;

use super::code::Code;
use crate::limits::Limits;

/// The tensors by name that a program builds, or those under its key `state_dict`; the error says
/// what is there instead.
pub fn state_dict(program: &[u8], limits: &Limits) -> Step<BTreeMap<String, View>> {
    let mut machine = Machine::new(limits);
    let root = machine.run(&mut Code::new(program))?;
    machine.state_dict(root)
}

/// What the pickles at the head of an older file say (see [`super::legacy`]).
pub struct Programs {
    /// The tensors by name.
    pub views: BTreeMap<String, View>,
    /// The class of each storage by its key.
    pub classes: BTreeMap<String, String>,
    /// The keys in the order in which the numbers follow.
    pub keys: Vec<String>,
    /// Where the numbers begin.
    pub end: usize,
}

/// Runs three programs, one after the other: facts about the machine, the object, the keys.
pub fn programs(bytes: &[u8], limits: &Limits) -> Step<Programs> {
    let mut code = Code::new(bytes);
    let mut machine = Machine::new(limits);
    let facts = machine.run(&mut code)?;
    if !machine.says_little_endian(facts) {
        return Err("numbers of a big-endian machine".into());
    }
    let mut machine = Machine::new(limits);
    let root = machine.run(&mut code)?;
    let views = machine.state_dict(root)?;
    let mut classes = BTreeMap::new();
    for object in &machine.objects {
        if let Object::Storage(storage) = object {
            let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
            classes.insert(text(storage.1), text(storage.0));
        }
    }
    let mut machine = Machine::new(limits);
    let root = machine.run(&mut code)?;
    let keys = machine
        .items(root)?
        .iter()
        .map(|key| match machine.at(*key) {
            Object::Text(key) => Ok(String::from_utf8_lossy(key).into_owned()),
            _ => Err(Flaw::from("a key of a storage that is no text")),
        });
    Ok(Programs {
        views,
        classes,
        keys: keys.collect::<Step<_>>()?,
        end: code.at(),
    })
}

/// What is wrong with a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// It is malformed: what was found.
    Wrong(String),
    /// It does more than it may: what there is too much of, the bound, and its name in [`Limits`].
    TooMany(&'static str, u64, &'static str),
}

impl From<String> for Flaw {
    fn from(what: String) -> Self {
        Self::Wrong(what)
    }
}

impl From<&str> for Flaw {
    fn from(what: &str) -> Self {
        Self::Wrong(what.into())
    }
}

/// The result of a part of a program.
pub type Step<T> = std::result::Result<T, Flaw>;

/// A tensor: elements of a storage.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct View {
    /// The member that holds the elements.
    pub key: String,
    /// The class of the storage, which says the element type.
    pub class: String,
    /// Where the elements are.
    pub offset: usize,
    /// Elements along each dimension.
    pub shape: Vec<usize>,
    /// The step between them.
    pub stride: Vec<usize>,
}

/// The longest name of a class or of a member; also where names are cut in messages.
const NAME: usize = 256;
/// The most dimensions of a tensor.
const DIMENSIONS: usize = 16;

/// What stands on the stack. Containers hold places in the machine's memory, so that nothing nests
/// however deep the pickle does; texts are parts of the program, so that nothing is copied however
/// often it is used.
#[derive(Clone, Debug, PartialEq)]
enum Object<'a> {
    None,
    Mark,
    Int(i64),
    Text(&'a [u8]),
    /// What may be called.
    Function(Function),
    /// A class or function that is only referred to; storages are told apart by its name.
    Class(&'a [u8]),
    Sequence(Vec<u32>),
    Dict(Vec<(u32, u32)>),
    Storage(Box<(&'a [u8], &'a [u8])>),
    View(Box<View>),
    Opaque,
}

/// The calls that a state dict needs or that are known to belong beside one.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Function {
    Dict,
    Tensor,
    Parameter,
    /// Makes a value that is of no interest here.
    Plain,
}

impl Function {
    /// The allow-list.
    fn find(module: &[u8], name: &[u8]) -> Option<Self> {
        Some(match (module, name) {
            (b"collections", b"OrderedDict" | b"defaultdict" | b"Counter") => Self::Dict,
            (b"torch._utils", b"_rebuild_tensor_v2") => Self::Tensor,
            (b"torch._utils", b"_rebuild_parameter") => Self::Parameter,
            (b"torch", b"Size" | b"device")
            | (b"argparse", b"Namespace")
            | (b"_codecs", b"encode")
            | (b"builtins" | b"__builtin__", b"set" | b"frozenset" | b"bytearray" | b"complex")
            | (b"numpy", b"dtype" | b"ndarray")
            | (b"numpy.core.multiarray" | b"numpy._core.multiarray", b"scalar" | b"_reconstruct") => {
                Self::Plain
            }
            _ => return None,
        })
    }
}

struct Machine<'a> {
    limits: &'a Limits,
    objects: Vec<Object<'a>>,
    stack: Vec<u32>,
    memo: BTreeMap<u32, u32>,
    views: usize,
}

impl<'a> Machine<'a> {
    fn new(limits: &'a Limits) -> Self {
        Self {
            limits,
            objects: Vec::new(),
            stack: Vec::new(),
            memo: BTreeMap::new(),
            views: 0,
        }
    }

    /// Runs a program to its end and gives the place of its result.
    fn run(&mut self, code: &mut Code<'a>) -> Step<u32> {
        for _ in 0..self.limits.pickle_ops {
            let op = code.byte()?;
            if op == b'.' {
                return self.pop();
            }
            self.step(op, code)?;
        }
        Err(Flaw::TooMany(
            "instructions of its pickle",
            self.limits.pickle_ops,
            "pickle_ops",
        ))
    }

    fn step(&mut self, op: u8, code: &mut Code<'a>) -> Step<()> {
        match op {
            0x80 => drop(code.byte()?),
            0x95 => drop(code.take(8)?),
            b'(' => self.push(Object::Mark),
            b'N' => self.push(Object::None),
            b'}' => self.push(Object::Dict(Vec::new())),
            b']' | b')' | 0x8f => self.push(Object::Sequence(Vec::new())),
            0x88 => self.push(Object::Int(1)),
            0x89 => self.push(Object::Int(0)),
            b'K' => self.push(Object::Int(code.number(1)?)),
            b'M' => self.push(Object::Int(code.number(2)?)),
            b'J' => self.push(Object::Int(i64::from(code.number(4)? as i32))),
            0x8a => {
                let n = usize::from(code.byte()?);
                self.push(Object::Int(code.long(n)?));
            }
            b'G' => {
                code.take(8)?;
                self.push(Object::Opaque);
            }
            b'X' | b'T' => self.text(code, 4)?,
            0x8c | b'U' => self.text(code, 1)?,
            b'B' | b'C' => {
                let n = code.number(if op == b'B' { 4 } else { 1 })?;
                code.take(n as usize)?;
                self.push(Object::Opaque);
            }
            b'c' => {
                let (module, name) = (code.line()?, code.line()?);
                self.push(global(module, name));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let object = match (self.at(module), self.at(name)) {
                    (Object::Text(module), Object::Text(name)) => global(module, name),
                    _ => return Err("a class whose name is no text".into()),
                };
                self.push(object);
            }
            b'q' => self.remember(code.number(1)? as u32)?,
            b'r' => self.remember(code.number(4)? as u32)?,
            0x94 => self.remember(self.memo.len() as u32)?,
            b'h' => self.recall(code.number(1)? as u32)?,
            b'j' => self.recall(code.number(4)? as u32)?,
            0x85..=0x87 => {
                let n = usize::from(op - 0x84);
                let first = self.stack.len().checked_sub(n).ok_or("an empty stack")?;
                let items = self.stack.split_off(first);
                self.push(Object::Sequence(items));
            }
            b't' => {
                let items = self.since_mark()?;
                self.push(Object::Sequence(items));
            }
            b'0' => drop(self.pop()?),
            b'1' => drop(self.since_mark()?),
            b'a' => {
                let item = self.pop()?;
                self.extend(&[item])?;
            }
            b'e' | b'u' => {
                let items = self.since_mark()?;
                self.extend(&items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.extend(&[key, value])?;
            }
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(id)?;
                self.push(storage);
            }
            b'R' | 0x81 => {
                let (args, callable) = (self.pop()?, self.pop()?);
                self.call(callable, args)?;
            }
            // Attributes of the object below, such as the metadata of a state dict.
            b'b' => drop(self.pop()?),
            other => {
                return Err(format!("the instruction {other:#04x} at {}", code.at() - 1).into());
            }
        }
        Ok(())
    }

    fn at(&self, place: u32) -> &Object<'a> {
        &self.objects[place as usize]
    }

    fn push(&mut self, object: Object<'a>) {
        self.stack.push(self.objects.len() as u32);
        self.objects.push(object);
    }

    fn pop(&mut self) -> Step<u32> {
        Ok(self.stack.pop().ok_or("an empty stack")?)
    }

    fn text(&mut self, code: &mut Code<'a>, width: usize) -> Step<()> {
        let n = code.number(width)?;
        let bytes = code.take(n as usize)?;
        self.push(Object::Text(bytes));
        Ok(())
    }

    fn since_mark(&mut self) -> Step<Vec<u32>> {
        let mark = self
            .stack
            .iter()
            .rposition(|place| *self.at(*place) == Object::Mark);
        let mark = mark.ok_or("no mark on the stack")?;
        let items = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(items)
    }

    fn extend(&mut self, items: &[u32]) -> Step<()> {
        let target = *self.stack.last().ok_or("an empty stack")?;
        match &mut self.objects[target as usize] {
            Object::Sequence(list) => list.extend_from_slice(items),
            Object::Dict(entries) => {
                entries.extend(items.as_chunks::<2>().0.iter().map(|[k, v]| (*k, *v)))
            }
            Object::Opaque => {}
            _ => return Err("items for something that holds none".into()),
        }
        Ok(())
    }

    fn remember(&mut self, key: u32) -> Step<()> {
        let top = *self.stack.last().ok_or("an empty stack")?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Step<()> {
        let place = *self
            .memo
            .get(&key)
            .ok_or("a memory that was never filled")?;
        self.stack.push(place);
        Ok(())
    }

    fn items(&self, place: u32) -> Step<&[u32]> {
        match self.at(place) {
            Object::Sequence(items) => Ok(items),
            _ => Err("no tuple where one is expected".into()),
        }
    }

    /// Whether a dictionary says so.
    fn says_little_endian(&self, facts: u32) -> bool {
        let Object::Dict(entries) = self.at(facts) else {
            return false;
        };
        entries.iter().any(|(key, value)| {
            *self.at(*key) == Object::Text(b"little_endian") && *self.at(*value) == Object::Int(1)
        })
    }

    /// `("storage", class, key, device, length)`, in older files with a view of another storage,
    /// which is never used, at the end.
    fn storage(&self, id: u32) -> Step<Object<'a>> {
        let items = self.items(id)?;
        if items
            .get(5)
            .is_some_and(|view| *self.at(*view) != Object::None)
        {
            return Err("a storage that is a part of another one".into());
        }
        if let [_, class, key, ..] = items
            && let Object::Class(class) = self.at(*class)
            && let Object::Text(key) = self.at(*key)
            && class.len().max(key.len()) <= NAME
        {
            return Ok(Object::Storage(Box::new((class, key))));
        }
        Err("a reference to something else than a storage".into())
    }

    fn call(&mut self, callable: u32, args: u32) -> Step<()> {
        let function = match self.at(callable) {
            Object::Function(function) => *function,
            Object::Class(name) => return Err(format!("a call of `{}`", shown(name)).into()),
            _ => return Err("a call of something that is no function".into()),
        };
        let object = match function {
            Function::Dict => Object::Dict(Vec::new()),
            Function::Tensor => Object::View(Box::new(self.view(args)?)),
            Function::Parameter => {
                let tensor = *self
                    .items(args)?
                    .first()
                    .ok_or("a parameter without a tensor")?;
                self.stack.push(tensor);
                return Ok(());
            }
            Function::Plain => Object::Opaque,
        };
        self.push(object);
        Ok(())
    }

    /// `(storage, offset, shape, stride, …)`.
    fn view(&mut self, args: u32) -> Step<View> {
        self.views += 1;
        if self.views > self.limits.tensors {
            let limit = self.limits.tensors as u64;
            return Err(Flaw::TooMany("tensors", limit, "tensors"));
        }
        let [storage, offset, shape, stride, ..] = self.items(args)? else {
            return Err("a tensor without its four parts".into());
        };
        let Object::Storage(storage) = self.at(*storage) else {
            return Err("a tensor without a storage".into());
        };
        let size = |place: &u32| match self.at(*place) {
            Object::Int(value) => usize::try_from(*value).map_err(|_| "a negative size".into()),
            _ => Err(Flaw::from("a size that is no number")),
        };
        let sizes = |place: u32| {
            let items = self.items(place)?;
            if items.len() > DIMENSIONS {
                return Err(format!("a tensor of {} dimensions", items.len()).into());
            }
            items.iter().map(size).collect::<Step<Vec<usize>>>()
        };
        Ok(View {
            key: String::from_utf8_lossy(storage.1).into_owned(),
            class: String::from_utf8_lossy(storage.0).into_owned(),
            offset: size(offset)?,
            shape: sizes(*shape)?,
            stride: sizes(*stride)?,
        })
    }

    /// The named tensors of a dictionary, or of the one under its key `state_dict`.
    fn state_dict(&self, root: u32) -> Step<BTreeMap<String, View>> {
        let Object::Dict(entries) = self.at(root) else {
            return Err("no dictionary".into());
        };
        let inner =
            entries
                .iter()
                .find_map(|(key, value)| match (self.at(*key), self.at(*value)) {
                    (Object::Text(b"state_dict"), Object::Dict(inner)) if *value != root => {
                        Some(inner)
                    }
                    _ => None,
                });
        let mut views = BTreeMap::new();
        for (key, value) in inner.unwrap_or(entries) {
            let Object::Text(name) = self.at(*key) else {
                continue;
            };
            let Object::View(view) = self.at(*value) else {
                return Err(format!("the entry `{}`, which is no tensor", shown(name)).into());
            };
            let name = String::from_utf8_lossy(name).into_owned();
            if views.contains_key(&name) {
                return Err(format!("the name `{}` twice", shown(name.as_bytes())).into());
            }
            views.insert(name, View::clone(view));
        }
        Ok(views)
    }
}

/// A class or function by name.
fn global<'a>(module: &'a [u8], name: &'a [u8]) -> Object<'a> {
    match Function::find(module, name) {
        Some(function) => Object::Function(function),
        None => Object::Class(name),
    }
}

/// A name in a message, cut where it is absurdly long.
fn shown(name: &[u8]) -> String {
    let cut = &name[..name.len().min(NAME)];
    let dots = if cut.len() < name.len() { "…" } else { "" };
    format!("{}{dots}", String::from_utf8_lossy(cut))
}
