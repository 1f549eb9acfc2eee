//! The stack machine of Python's pickle, reduced to what a dictionary of tensors needs.

use std::collections::BTreeMap;

/// The tensors by name that a program builds, or those under its key `state_dict`; the error says
/// what is there instead.
pub fn state_dict(program: &[u8]) -> Step<BTreeMap<String, View>> {
    let mut machine = Machine::default();
    let root = machine.run(program)?;
    machine.state_dict(root)
}

/// A block of elements in the archive.
#[derive(Clone, Debug, PartialEq)]
pub struct Storage {
    /// The class, which says the element type.
    pub class: String,
    /// The member that holds it.
    pub key: String,
}

/// A tensor: elements of a storage.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// Where the elements are.
    pub storage: Storage,
    /// The place of the first.
    pub offset: usize,
    /// Elements along each dimension.
    pub shape: Vec<usize>,
    /// The step between them.
    pub stride: Vec<usize>,
}

/// What stands on the stack. Containers hold places in the machine's memory, so that nothing nests
/// however deep the pickle does.
#[derive(Clone, Debug, PartialEq)]
enum Object {
    None,
    Mark,
    Int(i64),
    Text(String),
    Global(String, String),
    Sequence(Vec<usize>),
    Dict(Vec<(usize, usize)>),
    Storage(Storage),
    View(View),
    Opaque,
}

#[derive(Default)]
struct Machine {
    objects: Vec<Object>,
    stack: Vec<usize>,
    memo: BTreeMap<u32, usize>,
}

/// What a malformed program is called in messages.
pub type Step<T> = std::result::Result<T, String>;

impl Machine {
    /// Runs a program and gives the place of its result.
    fn run(&mut self, program: &[u8]) -> Step<usize> {
        let mut code = Code {
            bytes: program,
            at: 0,
        };
        loop {
            let op = code.byte()?;
            match op {
                b'.' => return self.pop(),
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
                b'X' | b'T' => self.text(&mut code, 4)?,
                0x8c | b'U' => self.text(&mut code, 1)?,
                b'B' | b'C' => {
                    let n = code.number(if op == b'B' { 4 } else { 1 })?;
                    code.take(n as usize)?;
                    self.push(Object::Opaque);
                }
                b'c' => {
                    let (module, name) = (code.line()?, code.line()?);
                    self.push(Object::Global(module, name));
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let global = match (&self.objects[module], &self.objects[name]) {
                        (Object::Text(m), Object::Text(n)) => Object::Global(m.clone(), n.clone()),
                        _ => Object::Opaque,
                    };
                    self.push(global);
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
                b'e' => {
                    let items = self.since_mark()?;
                    self.extend(&items)?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.extend(&[key, value])?;
                }
                b'u' => {
                    let items = self.since_mark()?;
                    self.extend(&items)?;
                }
                b'Q' => {
                    let id = self.pop()?;
                    let storage = self.storage(id)?;
                    self.push(Object::Storage(storage));
                }
                b'R' => {
                    let (args, callable) = (self.pop()?, self.pop()?);
                    let result = self.call(callable, args)?;
                    self.stack.push(result);
                }
                0x81 => {
                    self.pop()?;
                    self.pop()?;
                    self.push(Object::Opaque);
                }
                // Attributes of the object below, such as the metadata of a state dict.
                b'b' => drop(self.pop()?),
                other => return Err(format!("the instruction {other:#04x} at {}", code.at - 1)),
            }
        }
    }

    fn push(&mut self, object: Object) {
        self.stack.push(self.objects.len());
        self.objects.push(object);
    }

    fn pop(&mut self) -> Step<usize> {
        Ok(self.stack.pop().ok_or("an empty stack")?)
    }

    fn text(&mut self, code: &mut Code<'_>, width: usize) -> Step<()> {
        let n = code.number(width)?;
        let bytes = code.take(n as usize)?;
        self.push(Object::Text(String::from_utf8_lossy(bytes).into_owned()));
        Ok(())
    }

    fn since_mark(&mut self) -> Step<Vec<usize>> {
        let mark = self
            .stack
            .iter()
            .rposition(|i| self.objects[*i] == Object::Mark);
        let mark = mark.ok_or("no mark on the stack")?;
        let items = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(items)
    }

    fn extend(&mut self, items: &[usize]) -> Step<()> {
        let target = *self.stack.last().ok_or("an empty stack")?;
        match &mut self.objects[target] {
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

    fn items(&self, place: usize) -> Step<&[usize]> {
        match &self.objects[place] {
            Object::Sequence(items) => Ok(items),
            _ => Err("no tuple where one is expected".into()),
        }
    }

    /// `("storage", class, key, device, length)`.
    fn storage(&self, id: usize) -> Step<Storage> {
        if let [_, class, key, ..] = self.items(id)?
            && let Object::Global(_, class) = &self.objects[*class]
            && let Object::Text(key) = &self.objects[*key]
        {
            return Ok(Storage {
                class: class.clone(),
                key: key.clone(),
            });
        }
        Err("a reference to something else than a storage".into())
    }

    fn call(&mut self, callable: usize, args: usize) -> Step<usize> {
        let Object::Global(module, name) = &self.objects[callable] else {
            return Ok(self.place(Object::Opaque));
        };
        let object = match (module.as_str(), name.as_str()) {
            ("collections", "OrderedDict") => Object::Dict(Vec::new()),
            ("torch._utils", "_rebuild_tensor_v2") => Object::View(self.view(args)?),
            ("torch._utils", "_rebuild_parameter") => {
                return Ok(*self
                    .items(args)?
                    .first()
                    .ok_or("a parameter without a tensor")?);
            }
            _ => Object::Opaque,
        };
        Ok(self.place(object))
    }

    fn place(&mut self, object: Object) -> usize {
        self.objects.push(object);
        self.objects.len() - 1
    }

    /// `(storage, offset, shape, stride, …)`.
    fn view(&self, args: usize) -> Step<View> {
        let [storage, offset, shape, stride, ..] = self.items(args)? else {
            return Err("a tensor without its four parts".into());
        };
        let Object::Storage(storage) = &self.objects[*storage] else {
            return Err("a tensor without a storage".into());
        };
        let size = |place: &usize| match self.objects[*place] {
            Object::Int(value) => usize::try_from(value).map_err(|_| "a negative size".to_string()),
            _ => Err("a size that is no number".to_string()),
        };
        Ok(View {
            storage: storage.clone(),
            offset: size(offset)?,
            shape: self.items(*shape)?.iter().map(size).collect::<Step<_>>()?,
            stride: self.items(*stride)?.iter().map(size).collect::<Step<_>>()?,
        })
    }

    /// The named tensors of a dictionary, or of the one under its key `state_dict`.
    fn state_dict(&self, root: usize) -> Step<BTreeMap<String, View>> {
        let Object::Dict(entries) = &self.objects[root] else {
            return Err("no dictionary".into());
        };
        let named = |(key, value): &(usize, usize)| match &self.objects[*key] {
            Object::Text(name) => Some((name.clone(), *value)),
            _ => None,
        };
        let entries: Vec<(String, usize)> = entries.iter().filter_map(named).collect();
        if let Some((_, inner)) = entries.iter().find(|(name, value)| {
            name == "state_dict"
                && *value != root
                && matches!(self.objects[*value], Object::Dict(_))
        }) {
            let Object::Dict(inner) = &self.objects[*inner] else {
                return Err("no dictionary".into());
            };
            return self.views(inner.iter().filter_map(named));
        }
        self.views(entries.into_iter())
    }

    fn views(
        &self,
        entries: impl Iterator<Item = (String, usize)>,
    ) -> Step<BTreeMap<String, View>> {
        entries
            .map(|(name, value)| match &self.objects[value] {
                Object::View(view) => Ok((name, view.clone())),
                _ => Err(format!("the entry `{name}`, which is no tensor")),
            })
            .collect()
    }
}

/// The bytes of a program, and where it stands.
struct Code<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Code<'a> {
    fn take(&mut self, n: usize) -> Step<&'a [u8]> {
        let end = self
            .at
            .checked_add(n)
            .filter(|end| *end <= self.bytes.len());
        let end = end.ok_or("a program that breaks off")?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> Step<u8> {
        Ok(self.take(1)?[0])
    }

    /// An unsigned number of up to four bytes.
    fn number(&mut self, width: usize) -> Step<i64> {
        Ok(self
            .take(width)?
            .iter()
            .rev()
            .fold(0, |n, b| n << 8 | i64::from(*b)))
    }

    /// A signed number of up to eight bytes.
    fn long(&mut self, width: usize) -> Step<i64> {
        let bytes = self.take(width)?;
        if width > 8 {
            return Err("a number of more than 64 bits".into());
        }
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let start = if negative { -1 } else { 0 };
        Ok(bytes
            .iter()
            .rev()
            .fold(start, |n, b| n << 8 | i64::from(*b)))
    }

    fn line(&mut self) -> Step<String> {
        let rest = &self.bytes[self.at..];
        let end = rest
            .iter()
            .position(|b| *b == b'\n')
            .ok_or("a program that breaks off")?;
        let line = self.take(end + 1)?;
        Ok(String::from_utf8_lossy(&line[..end]).into_owned())
    }
}
