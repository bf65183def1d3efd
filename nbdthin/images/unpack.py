"""Applying a layer to a directory: what the OCI image-spec's layer.md says, for tars that nobody vouches for.

Where a member may go
- Names are relative, without `..`, and lie below the root. Anything else is refused with the member's name.
- A link that stands where a name has a directory (`lib` -> `usr/lib`) is followed as the container would: an absolute
  target begins at the root, and `..` beyond the root, a loop, or a target that is not there is refused. The last part
  of a name is never followed: what is there is replaced.
- All this is done here, one part at a time, over descriptors opened with O_NOFOLLOW; the kernel never follows a link.
  Nobody else may change the tree meanwhile.

What a layer takes away
- `.wh.NAME` takes NAME of the layers below, `.wh..wh..opq` all that they have in a directory. What this layer itself
  brings stays, in whatever order it comes. Other names that begin with `.wh..wh.` are bookkeeping of aufs: skipped.

Directories get their owner, mode, attributes and times at the end: until then, what is put into them changes them. One
that the layer does not list keeps the time it had.

A refusal leaves the tree half made. The caller works on something that it can throw away, such as a new volume.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple, Self, cast

from nbdthin.errors import Error, Invalid, NoSpace
from nbdthin.images.tape import Headers, Tape, shown
from nbdthin.units import KiB

PATH_LIMIT = 4096  # bytes of a name, as Linux has it
MEMBERS = 4_000_000  # of one layer; each costs an inode
_LINKS = 40  # followed for one name, as Linux does
_DEPTH = 256  # directories in each other: each is a descriptor while a name is walked, and a process has 1024
_OPEN = 256  # directories kept open between members
_HOLE = 4 * KiB  # zeroes of this size, aligned, are not written
_ZEROES = bytes(_HOLE)
_NOWHERE = (b"", b".", b"..")  # as a part of a name

WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_AUFS = b".wh..wh."

XATTR = "SCHILY.xattr."
# Of the host, not of the image: labels that its policy gives, and what its overlayfs keeps.
NOT_OURS = ("security.selinux", "trusted.overlay.", "user.overlay.")
_ACLS = ("system.posix_acl_access", "system.posix_acl_default")

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE)
_DEVICES = {tarfile.CHRTYPE: stat.S_IFCHR, tarfile.BLKTYPE: stat.S_IFBLK, tarfile.FIFOTYPE: stat.S_IFIFO}


class Applied(NamedTuple):
    members: int
    data: int  # bytes of files, without holes that the layer has as such


def apply(tar: Iterable[bytes], root: str | os.PathLike[str]) -> Applied:
    """Apply the layer whose uncompressed tar comes in pieces from `tar` to the directory `root`.

    All of `tar` is taken, and with the last piece it may still raise: then nothing of the layer is to be kept.
    Who is not root becomes the owner of everything, without the attributes that only root can set; a device is refused.
    Raises Invalid and Error with the member's name, NoSpace, and OSError for a root that is none.
    """
    with _Tree(root) as tree:
        return tree.apply(Tape(tar))


class _Refused(Exception):
    """Why a member is refused; its name is put before it further up."""


class _Wanted(NamedTuple):
    """What a directory is given at the end."""

    mtime: int  # ns
    mode: int | None  # None: as it is
    member: tarfile.TarInfo | None  # where the layer lists it


class _Tree:
    """A root that one layer is being applied to. A path is relative to it, bytes, without links; the root is empty."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._open = {b"": os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)}  # directories by path
        self._known: dict[bytes, bytes] = {}  # paths of directories that are open, by what members call them
        self._directories: dict[bytes, _Wanted] = {}  # those that this layer lists or changes
        self._bequeath: set[bytes] = set()  # directories that give what is made in them an access list
        self._added = {b""}  # what this layer brings, and the directories that have it in them
        self._privileged = os.geteuid() == 0
        self._data = 0
        self._look_for_list(b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for fd in self._open.values():
            os.close(fd)

    def apply(self, tape: Tape) -> Applied:
        count = 0
        for member in Headers(tape, "the layer's tar").all():
            count += 1
            if count > MEMBERS:
                raise Invalid(f"a layer of more than {MEMBERS} members is refused")
            name = member.name.encode("utf-8", "surrogateescape")
            _named(name, self._apply, name, member, tape)
        tape.drain()
        for path in sorted(self._directories, reverse=True):  # inside first: a mode may bar the way
            self._keep_few_open()
            _named(path, self._finish, path, self._directories[path])
        return Applied(count, self._data)

    # -- members

    def _apply(self, name: bytes, member: tarfile.TarInfo, tape: Tape) -> None:
        head, _, last = name.rpartition(b"/")
        parent = self._known.get(head)
        if parent is None or last in _NOWHERE or last.startswith(WHITEOUT):
            self._keep_few_open()
            parts = _parts(name)
            if not parts:
                if member.type != tarfile.DIRTYPE:
                    raise _Refused("the root can only be a directory")
                self._directories[b""] = _Wanted(_mtime(member), member.mode & 0o7777, member)
                return
            named, last = b"/".join(parts[:-1]), parts[-1]
            if WHITEOUT in name and self._whiteout(parts, named, last):
                return
            parent = self._directory(named, create=True)
            assert parent is not None
            if name.endswith(last):
                self._known[head] = parent
        path = parent + b"/" + last if parent else last
        if parent not in self._directories:
            self._change(parent)
        kind = member.type
        if kind in _FILES:
            self._file(path, parent, last, member, tape)
        elif kind == tarfile.DIRTYPE:
            self._new(path, parent, last, lambda fd: os.mkdir(last, 0o700, dir_fd=fd), directory=True)
            if not self._privileged:
                os.chmod(last, 0o700, dir_fd=self._open[parent])
            self._directories[path] = _Wanted(_mtime(member), member.mode & 0o7777, member)
        elif kind == tarfile.SYMTYPE:
            target = _text(member.linkname)
            self._new(path, parent, last, lambda fd: os.symlink(target, last, dir_fd=fd))
            self._describe(parent, last, member)
        elif kind == tarfile.LNKTYPE:
            self._link(path, parent, last, _text(member.linkname))
        elif kind in _DEVICES:
            self._device(path, parent, last, member)
        else:
            raise _Refused(f"a member of a type that is not known: {member.type!r}")
        if path not in self._added:
            self._bring(path, parent)

    def _file(self, path: bytes, parent: bytes, last: bytes, member: tarfile.TarInfo, tape: Tape) -> None:
        try:
            out = os.open(last, _NEW_FILE, 0o600, dir_fd=self._open[parent])
        except FileExistsError:
            self._remove(path, parent, last)
            out = os.open(last, _NEW_FILE, 0o600, dir_fd=self._open[parent])
        try:
            if member.size:
                self._data += _copy(tape, out, member)
            self._own(out, parent, member)
            os.fchmod(out, member.mode & 0o7777)
            mtime = _mtime(member)
            os.utime(out, ns=(mtime, mtime))
        finally:
            os.close(out)

    def _link(self, path: bytes, parent: bytes, last: bytes, target: bytes) -> None:
        parts = _parts(target, "it is a hard link to ")
        source = self._directory(b"/".join(parts[:-1]), create=False) if parts else None
        if source is None:
            raise _Refused(f"it is a hard link to {shown(target)}, which is not there")
        original = source + b"/" + parts[-1] if source else parts[-1]
        if original == path:
            return
        if original.startswith(path + b"/"):
            raise _Refused(f"it is a hard link to {shown(target)}, which it would replace")
        try:
            kind = os.stat(parts[-1], dir_fd=self._open[source], follow_symlinks=False).st_mode
        except FileNotFoundError:
            raise _Refused(f"it is a hard link to {shown(target)}, which is not there") from None
        if stat.S_ISDIR(kind):
            raise _Refused(f"it is a hard link to {shown(target)}, which is a directory")
        from_fd, name = self._open[source], parts[-1]
        self._new(
            path,
            parent,
            last,
            lambda fd: os.link(name, last, src_dir_fd=from_fd, dst_dir_fd=fd, follow_symlinks=False),
        )

    def _device(self, path: bytes, parent: bytes, last: bytes, member: tarfile.TarInfo) -> None:
        kind = _DEVICES[member.type]
        if not self._privileged and kind != stat.S_IFIFO:
            raise _Refused("only root can make a device")
        number = 0 if kind == stat.S_IFIFO else os.makedev(member.devmajor, member.devminor)
        self._new(path, parent, last, lambda fd: os.mknod(last, kind | 0o600, number, dir_fd=fd))
        self._describe(parent, last, member)
        os.chmod(last, member.mode & 0o7777, dir_fd=self._open[parent])

    def _describe(self, parent: bytes, last: bytes, member: tarfile.TarInfo) -> None:
        """Owner, attributes and time of what cannot be opened: a link, a device."""
        fd = self._open[parent]
        self._own(b"/proc/self/fd/%d/%b" % (fd, last), parent, member)
        mtime = _mtime(member)
        os.utime(last, ns=(mtime, mtime), dir_fd=fd, follow_symlinks=False)

    def _own(self, where: int | bytes, parent: bytes, member: tarfile.TarInfo) -> None:
        """Owner and attributes: in this order, as a new owner takes capabilities away; and before the mode."""
        follow = isinstance(where, int)  # a descriptor, which leads nowhere else
        if self._privileged:
            os.chown(where, member.uid, member.gid, follow_symlinks=follow)
        if parent in self._bequeath:
            with suppress(OSError):
                os.removexattr(where, _ACLS[0], follow_symlinks=follow)
        if not member.pax_headers:
            return
        for name, value in _xattrs(member).items():
            if self._privileged or name.startswith("user."):
                try:
                    os.setxattr(where, name, value, follow_symlinks=follow)
                except OSError as error:
                    raise _Refused(f"its attribute {shown(name)}: {error.strerror}") from None

    def _finish(self, path: bytes, wanted: _Wanted) -> None:
        found = self._directory(path, create=False)
        assert found == path
        fd = self._open[path]
        if wanted.member is not None:
            mine = _xattrs(wanted.member) if wanted.member.pax_headers else {}
            with suppress(OSError):  # not all file systems have any, and not all users may
                for name in os.listxattr(fd):
                    if name not in mine and not name.startswith(NOT_OURS):
                        os.removexattr(fd, name)
            self._own(fd, path, wanted.member)
        if wanted.mode is not None:
            os.fchmod(fd, wanted.mode)
        os.utime(fd, ns=(wanted.mtime, wanted.mtime))

    def _new(
        self, path: bytes, parent: bytes, last: bytes, make: Callable[[int], None], *, directory: bool = False
    ) -> None:
        """Have `make` make something in the open directory `parent`, in place of what is there."""
        try:
            make(self._open[parent])
        except FileExistsError:
            status = os.stat(last, dir_fd=self._open[parent], follow_symlinks=False)
            if not (directory and stat.S_ISDIR(status.st_mode)):
                self._remove(path, parent, last)
                make(self._open[parent])

    def _bring(self, path: bytes, parent: bytes) -> None:
        self._added.add(path)
        while parent not in self._added:
            self._added.add(parent)
            parent = parent.rpartition(b"/")[0]

    # -- taking away

    def _whiteout(self, parts: list[bytes], named: bytes, last: bytes) -> bool:
        """Whether it is a whiteout, or otherwise not for the tree; it is done then."""
        for part in parts[:-1]:
            if part.startswith(_AUFS):
                return True
            if part.startswith(WHITEOUT):
                raise _Refused("it lies below a whiteout")
        if not last.startswith(WHITEOUT):
            return False
        if last.startswith(_AUFS) and last != _OPAQUE:
            return True
        target = last[len(WHITEOUT) :]
        if target in _NOWHERE:
            raise _Refused("a whiteout of nothing")
        parent = self._directory(named, create=False)
        if parent is None:
            return True
        if last == _OPAQUE:
            self._clear(parent)
            return True
        path = parent + b"/" + target if parent else target
        try:
            status = os.stat(target, dir_fd=self._open[parent], follow_symlinks=False)
        except FileNotFoundError:
            return True
        if path not in self._added:
            self._change(parent)
            self._remove(path, parent, target)
        elif stat.S_ISDIR(status.st_mode):
            self._clear(path)
        return True

    def _clear(self, path: bytes) -> None:
        """Take all out of a directory that the layers below have in it."""
        self._directory(path, create=False)
        fd = self._open[path]
        self._change(path)
        for entry in os.listdir(fd):
            name = os.fsencode(entry)
            below = path + b"/" + name if path else name
            if below not in self._added:
                self._remove(below, path, name)
            elif stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                self._clear(below)

    def _remove(self, path: bytes, parent: bytes, last: bytes) -> None:
        """Whatever has this path, with all that is below."""
        fd = self._open[parent]
        mode = os.stat(last, dir_fd=fd, follow_symlinks=False).st_mode
        if not stat.S_ISDIR(mode):
            os.unlink(last, dir_fd=fd)
            if stat.S_ISLNK(mode):
                self._known.clear()
            return
        below = path + b"/"
        self._known.clear()
        for gone in [known for known in self._open if known == path or known.startswith(below)]:
            os.close(self._open.pop(gone))
        for gone in [known for known in self._directories if known == path or known.startswith(below)]:
            del self._directories[gone]
        shutil.rmtree(last, dir_fd=fd)

    # -- directories

    def _change(self, path: bytes) -> None:
        """The open directory `path` is about to be changed: its time is put back at the end."""
        if path not in self._directories:
            fd = self._open[path]
            status = os.fstat(fd)
            mode = None
            if not self._privileged and status.st_mode & 0o700 != 0o700:
                mode = stat.S_IMODE(status.st_mode)
                os.fchmod(fd, mode | 0o700)
            self._directories[path] = _Wanted(status.st_mtime_ns, mode, None)

    def _look_for_list(self, path: bytes) -> None:
        """What is made in a directory with a default access list has that for a start, which no layer says."""
        with suppress(OSError):
            os.getxattr(self._open[path], _ACLS[1])
            self._bequeath.add(path)

    def _keep_few_open(self) -> None:
        if len(self._open) > _OPEN:
            root = self._open.pop(b"")
            for fd in self._open.values():
                os.close(fd)
            self._open = {b"": root}
            self._known.clear()

    def _directory(self, named: bytes, *, create: bool) -> bytes | None:
        """The path of the directory that a member calls `named`, which is open then.

        None where it is not there, and not to be made. Raises _Refused for what leads nowhere or out.
        """
        if named in self._open:
            return named
        if named in self._known:
            return self._known[named]
        path = b""
        link = b""  # the last that was followed
        links = 0
        ahead = [(part, False) for part in reversed(named.split(b"/"))]  # of each: whether it is from a link
        while ahead:
            part, linked = ahead.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":  # only from links
                if not path:
                    raise _Refused(f"the link {shown(link)} leads out of the root")
                path = path.rpartition(b"/")[0]
                continue
            below = path + b"/" + part if path else part
            if below in self._open or self._enter(path, below, part, create=create and not linked):
                path = below
                continue
            try:
                target = os.readlink(part, dir_fd=self._open[path])
            except FileNotFoundError:
                if linked and create:
                    raise _Refused(f"the link {shown(link)} leads to what is not there") from None
                return None
            except OSError:
                if not create:
                    return None
                raise _Refused(f"{shown(below)} is not a directory") from None
            link = below
            links += 1
            if links > _LINKS:
                raise _Refused(f"the link {shown(link)} leads to too many others")
            if target.startswith(b"/"):
                path = b""
            ahead += [(part, True) for part in reversed(target.split(b"/"))]
        if path != named:
            self._known[named] = path
        return path

    def _enter(self, path: bytes, below: bytes, part: bytes, *, create: bool) -> bool:
        """Open the directory `below`, which is `part` in `path`; false if it is none."""
        if below.count(b"/") >= _DEPTH or len(below) > PATH_LIMIT:
            raise _Refused(f"more than {_DEPTH} directories in each other, or a path of more than {PATH_LIMIT} bytes")
        parent = self._open[path]
        try:
            self._open[below] = os.open(part, _DIRECTORY, dir_fd=parent)
            self._look_for_list(below)
            return True
        except FileNotFoundError:
            if not create:
                return False
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                return False
            raise
        self._change(path)
        os.mkdir(part, 0o700, dir_fd=parent)
        fd = self._open[below] = os.open(part, _DIRECTORY, dir_fd=parent)
        if path in self._bequeath:
            for name in _ACLS:
                os.removexattr(fd, name)
        if self._privileged:
            os.fchown(fd, 0, 0)
        os.fchmod(fd, 0o755)
        self._bring(below, path)
        return True


def _named(name: bytes, work: Callable[..., None], *args: object) -> None:
    """Do `work`; what is wrong is said with the name of the member that it is about."""
    try:
        work(*args)
    except _Refused as error:
        raise Invalid(f"{shown(name)}: {error}") from None
    except OSError as error:
        kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else Error
        raise kind(f"{shown(name)}: {error.strerror or error}") from error
    except (ValueError, OverflowError) as error:
        raise Invalid(f"{shown(name)}: {error}") from None


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    if b"\0" in data:
        raise _Refused("a name with a zero byte in it")
    return data


def _parts(name: bytes, whose: str = "") -> list[bytes]:
    """The parts of a relative name."""
    said = f"{whose}{shown(name)}, " if whose else ""
    if name.startswith(b"/"):
        raise _Refused(f"{said}an absolute path")
    if len(name) > PATH_LIMIT or b"\0" in name:
        raise _Refused(f"{said}a name of more than {PATH_LIMIT} bytes, or with a zero byte in it")
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise _Refused(f"{said}a path that leads up")
    return parts


_TIME = re.compile(r"(-?)(\d{1,12})(?:\.(\d{0,30}))?", re.ASCII)


def _mtime(member: tarfile.TarInfo) -> int:
    """Nanoseconds. tarfile has a float, which cannot hold them."""
    text = member.pax_headers.get("mtime") if member.pax_headers else None
    if text is None:
        return int(member.mtime) * 10**9
    match = _TIME.fullmatch(text)
    if match is None:
        raise _Refused(f"its time is no time: {text[:100]!r}")
    sign, seconds, fraction = match.groups()
    value = int(seconds) * 10**9 + int((fraction or "").ljust(9, "0")[:9])
    return -value if sign else value


def _xattrs(member: tarfile.TarInfo) -> dict[str, bytes]:
    return {
        key[len(XATTR) :]: value.encode("utf-8", "surrogateescape")
        for key, value in member.pax_headers.items()
        if key.startswith(XATTR) and not key.startswith(NOT_OURS, len(XATTR))
    }


# -- data


def _copy(tape: Tape, out: int, member: tarfile.TarInfo) -> int:
    """A member's data to a new file; returns how many bytes the tar has of them."""
    size = member.size
    if size < 0:
        raise _Refused("a negative size")
    if size < _HOLE and member.sparse is None:
        data = tape.take(size)
        _put(out, data, 0, len(data), 0)
        if len(data) != size:
            raise _Refused("the layer ends inside it")
        return size
    runs = [(0, size)] if member.sparse is None else _runs(member)
    end = 0  # of what is written
    for position, length in runs:
        at = position
        for chunk, start, stop in tape.pieces(length):
            end = _write(out, chunk, start, stop, at) or end
            at += stop - start
        if at != position + length:
            raise _Refused("the layer ends inside it")
    if end != size:
        os.ftruncate(out, size)
    return sum(length for _, length in runs)


def _runs(member: tarfile.TarInfo) -> list[tuple[int, int]]:
    """Where a sparse member has data, checked: (position, length), in bytes."""
    if "size" in member.pax_headers:
        raise _Refused("a sparse file whose headers have its size twice")
    runs = [(position, length) for position, length in cast(list[tuple[int, int]], member.sparse) if length]
    end = 0
    for position, length in runs:
        if position < end or length < 0 or position + length > member.size:
            raise _Refused("a sparse file whose map is no map of it")
        end = position + length
    return runs


def _write(out: int, chunk: bytes, start: int, stop: int, at: int) -> int:
    """Write chunk[start:stop] at `at` of a new file, but for blocks of zeroes and what is here of one; returns the end
    of what was written, 0 if nothing.
    """
    end = 0
    written = block = start  # up to here it is
    while block < stop:
        after = min(block + _HOLE - (at + block - start) % _HOLE, stop)
        if chunk.startswith(_ZEROES[: after - block], block):
            if written < block:
                end = _put(out, chunk, written, block, at + written - start)
            written = after
        block = after
    if written < stop:
        end = _put(out, chunk, written, stop, at + written - start)
    return end


def _put(out: int, chunk: bytes, start: int, stop: int, at: int) -> int:
    view = memoryview(chunk)
    while start < stop:
        done = os.pwrite(out, view[start:stop], at)
        start += done
        at += done
    return at
