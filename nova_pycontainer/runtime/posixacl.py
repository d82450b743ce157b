# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""POSIX access control lists: from tar's text to the kernel's form.

GNU tar ``--acls`` stores what acl_to_text(3) prints, with names; star appends
the number as a fourth field. The kernel's form is
``include/uapi/linux/posix_acl_xattr.h``.
"""

import collections.abc as cabc
import re
import struct
import typing as ty

XATTRS: ty.Final = {
    'SCHILY.acl.access': 'system.posix_acl_access',
    'SCHILY.acl.default': 'system.posix_acl_default',
}
_VERSION: ty.Final = 2
_UNDEFINED_ID: ty.Final = 0xffffffff
#: tag by (kind, has a qualifier)
_TAGS: ty.Final = {
    ('user', False): 0x01, ('user', True): 0x02,
    ('group', False): 0x04, ('group', True): 0x08,
    ('mask', False): 0x10, ('other', False): 0x20,
}
_ENTRY: ty.Final = re.compile(
    r'(user|u|group|g|mask|m|other|o):([^:]*):([r-][w-][x-])(?::(\d+))?$')


def names(table: str) -> dict[str, int]:
    """Read the names and ids of an /etc/passwd or /etc/group."""
    ids: dict[str, int] = {}
    for line in table.splitlines():
        fields = line.split(':')
        if len(fields) > 2 and fields[2].isdecimal():
            ids.setdefault(fields[0], int(fields[2]))
    return ids


def from_text(
    text: str, users: cabc.Mapping[str, int], groups: cabc.Mapping[str, int]
) -> bytes:
    """Return the value of the extended attribute for an ACL in text form.

    :raises ValueError: a malformed entry, or a name that the image's own
        /etc/passwd or /etc/group does not have
    """
    entries = []
    for part in re.split(r'[,\n]', text):
        part = part.partition('#')[0].strip()
        if not part:
            continue
        match = _ENTRY.match(part)
        if not match:
            raise ValueError(f'bad ACL entry {part!r}')
        kind, qualifier, permissions, number = match.groups()
        kind = {'u': 'user', 'g': 'group', 'm': 'mask', 'o': 'other'}.get(
            kind, kind)
        ident = _UNDEFINED_ID
        if qualifier:
            table = users if kind == 'user' else groups
            if qualifier.isdecimal():
                ident = int(qualifier)
            elif qualifier in table:
                ident = table[qualifier]
            elif number:
                ident = int(number)
            else:
                raise ValueError(f'unknown {kind} {qualifier!r}')
            if ident > 0xffff:
                raise ValueError(f'{kind} id {ident} is above 65535')
        try:
            tag = _TAGS[kind, bool(qualifier)]
        except KeyError:
            raise ValueError(f'bad ACL entry {part!r}') from None
        bits = sum(
            bit for bit, letter in zip((4, 2, 1), permissions)
            if letter != '-')
        entries.append((tag, ident, bits))
    # The kernel wants them in the order of tags, then ids
    # (posix_acl_valid()).
    return struct.pack('<I', _VERSION) + b''.join(
        struct.pack('<HHI', tag, bits, ident)
        for tag, ident, bits in sorted(entries))
