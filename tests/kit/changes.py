"""Ways in which a file becomes another one, or goes."""

import os


def in_place(path):
    path.write_bytes(b"other")


def by_rename(path):
    path.with_suffix(".new").write_bytes(b"other")
    os.replace(path.with_suffix(".new"), path)


def same_size_and_time(path):
    state = path.stat()
    path.write_bytes(bytes(len(path.read_bytes())))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def same_by_rename(path):
    state = path.stat()
    path.with_suffix(".new").write_bytes(bytes(state.st_size))
    os.utime(path.with_suffix(".new"), ns=(state.st_atime_ns, state.st_mtime_ns))
    os.replace(path.with_suffix(".new"), path)


def gone(path):
    path.unlink()


def another_link(path):
    other = path.with_suffix(".other")
    other.write_bytes(b"other")
    path.unlink()
    path.symlink_to(other)


CHANGES = [in_place, by_rename, same_size_and_time, same_by_rename, gone, another_link]
