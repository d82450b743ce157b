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

"""What two hosts must have in common for a guest to move between them."""

import collections.abc as cabc
import ctypes
import platform
import re
import typing as ty

from nova_pycontainer.runtime.migration.inspection import Problem

Facts = dict[str, ty.Any]

#: x86: what a program finds by CPUID and then uses. The kernel shows many
#: more flags, of itself and of mitigations, which may differ.
_X86 = re.compile(
    r'3dnow(ext|prefetch)?|abm|adx|aes|amx_\w+|avx\w*|bmi[12]|cldemote|'
    r'clflush(opt)?|clwb|clzero|cmov|cx8|cx16|enqcmd|erms|f16c|fma4?|fpu|'
    r'fsgsbase|fsrm|fxsr(_opt)?|gfni|hle|lahf_lm|lwp|lzcnt|misalignsse|mmx|'
    r'mmxext|movbe|movdir64b|movdiri|mpx|ospke|pclmulqdq|popcnt|prefetchw\w*|'
    r'rdpid|rdpru|rdrand|rdseed|rdtscp|rtm|serialize|sha_ni|sha512|sm[34]|'
    r'sse\w*|ssse3|syscall|tbm|tsc|tsxldtrk|uintr|user_shstk|vaes|'
    r'vpclmulqdq|waitpkg|wbnoinvd|xgetbv1|xop|xsave\w*')

#: getauxval(3): how much of a signal's stack the kernel needs, which is a
#: constant and what XSAVE writes.
_AT_MINSIGSTKSZ = 51

_libc = ctypes.CDLL(None)
_libc.getauxval.restype = ctypes.c_ulong


def cpu() -> Facts:
    """What a guest may have found out about this host's CPU."""
    flags: set[str] = set()
    model = ''
    with open('/proc/cpuinfo') as f:
        for line in f:
            name, _, value = line.partition(':')
            name = name.strip().lower()
            if name in ('flags', 'features') and not flags:
                flags = set(value.split())
            elif name == 'model name' and not model:
                model = value.strip()
    machine = platform.machine()
    if machine == 'x86_64':
        flags = {f for f in flags if _X86.fullmatch(f)}
    return {
        'architecture': machine, 'model': model, 'flags': sorted(flags),
        'signal_frame': int(_libc.getauxval(_AT_MINSIGSTKSZ)),
    }


def version(text: str) -> tuple[int, ...]:
    """The leading numbers: ``6.12.3-amd64`` → (6, 12)."""
    return tuple(int(n) for n in re.findall(r'\d+', text)[:2])


def compare(
    theirs: cabc.Mapping[str, ty.Any], ours: cabc.Mapping[str, ty.Any],
) -> tuple[list[Problem], list[Problem]]:
    """What keeps a guest of their host from running on ours.

    :param theirs: ``cpu``, ``kernel``, ``criu``, ``cgroup`` of the source
    :returns: problems, and what may become one
    """
    problems: list[Problem] = []
    warnings: list[Problem] = []
    there, here = theirs['cpu'], ours['cpu']
    if there['architecture'] != here['architecture']:
        problems.append(Problem(
            'architecture', f'the source has {there["architecture"]}, this '
            f'host has {here["architecture"]}',
            'Migrate to a host of the same architecture'))
        return problems, warnings
    missing = sorted(set(there['flags']) - set(here['flags']))
    if missing:
        problems.append(Problem(
            'cpu-features', 'the CPU of this host lacks '
            f'{", ".join(missing)}, which programs of the guest may use '
            f'(source: {there["model"]}, here: {here["model"]})',
            'Migrate to a host with an equal or newer CPU, or cold'))
    elif there['signal_frame'] > here['signal_frame']:
        problems.append(Problem(
            'cpu-state', 'the registers of the source\'s CPU are larger '
            f'({there["signal_frame"]} bytes in a signal\'s frame) than '
            f'this host\'s ({here["signal_frame"]})',
            'Migrate to a host with an equal or newer CPU, or cold'))
    if version(ours['criu']) < version(theirs['criu']):
        problems.append(Problem(
            'criu-version', f'CRIU {ours["criu"]} of this host is older '
            f'than CRIU {theirs["criu"]} of the source, whose images it '
            'need not understand', 'Upgrade criu here'))
    if ours['cgroup'] != theirs['cgroup']:
        problems.append(Problem(
            'cgroup-mode', f'the control groups of the source are '
            f'{theirs["cgroup"]}, those of this host {ours["cgroup"]}',
            'Boot both hosts with the same hierarchy, best with cgroup v2 '
            'only'))
    if version(ours['kernel']) < version(theirs['kernel']):
        warnings.append(Problem(
            'kernel-version', f'the kernel of this host '
            f'({ours["kernel"]}) is older than the source\'s '
            f'({theirs["kernel"]}); what the guest has of the newer one '
            'cannot be restored', 'Upgrade the kernel here'))
    return problems, warnings
