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

"""Platforms of container images: which of them this host runs.

Images name them as Go does (image-index.md, "platform"): GOOS, GOARCH, and a
variant of the processor.
"""

import os
import typing as ty

from nova_pycontainer.runtime import archive

#: uname(2)'s machine → architecture, and the variants that run there, the
#: best one first. None is what an image has that says none. Levels of x86-64
#: above the first one are left out: a server has to run on the next host too.
_HOSTS: ty.Final[dict[str, tuple[str, tuple[str | None, ...]]]] = {
    'x86_64': ('amd64', (None, 'v1')),
    'i686': ('386', (None,)),
    'aarch64': ('arm64', ('v8', None)),
    'armv7l': ('arm', ('v7', None, 'v6', 'v5')),
    'armv6l': ('arm', ('v6', None, 'v5')),
    'ppc64le': ('ppc64le', (None,)),
    's390x': ('s390x', (None,)),
    'riscv64': ('riscv64', (None,)),
    'loongarch64': ('loong64', (None,)),
}


def _here() -> tuple[str, tuple[str | None, ...]]:
    machine = os.uname().machine
    return _HOSTS.get(machine, (machine, (None,)))


def host() -> str:
    """The platform of this host, as images name it."""
    return f'linux/{_here()[0]}'


def name(platform: ty.Mapping[str, ty.Any]) -> str:
    """A platform from an image, safe to log."""
    found = (platform.get(key) for key in ('os', 'architecture', 'variant'))
    return archive.show('/'.join(
        part for part in found if isinstance(part, str) and part
    ) or 'no platform')[1:-1]


def rank(platform: ty.Mapping[str, ty.Any]) -> int | None:
    """How well an image runs here: 0 is best, None not at all.

    :param platform: with ``os``, ``architecture`` and perhaps ``variant``: a
        descriptor's platform, or an image's configuration
    """
    architecture, variants = _here()
    if (platform.get('os'), platform.get('architecture')) != (
            'linux', architecture):
        return None
    variant = platform.get('variant') or None
    return variants.index(variant) if variant in variants else None
