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

"""Features of the host's CPUs as traits, for flavors and images that ask."""

import os_traits

_PREFIX = 'HW_CPU_X86_'

#: proc_cpuinfo(5) and os-traits, where they differ in more than underscores.
_NAMES = {
    'aes': 'AESNI', 'bmi1': 'BMI', 'fma': 'FMA3', 'gfni': 'AVX512GFNI',
    'pclmulqdq': 'CLMUL', 'pni': 'SSE3', 'rtm': 'TSX', 'sha_ni': 'SHA',
    'vaes': 'AVX512VAES', 'vpclmulqdq': 'AVX512VPCLMULQDQ',
}

#: Not of a program in a guest, but of who runs virtual machines, or of the
#: kernel.
_NOT_OURS = ('AMD_', 'INTEL_', 'PDPE1GB', 'SGX', 'STIBP', 'SVM', 'VMX')

#: Those that this driver sets where they are true, and takes away elsewhere.
OWN = frozenset(
    trait for trait in os_traits.get_traits(_PREFIX)
    if not trait.removeprefix(_PREFIX).startswith(_NOT_OURS))


def traits(flags):
    """The traits of a CPU.

    :param flags: of /proc/cpuinfo
    """
    names = (_NAMES.get(flag, flag.replace('_', '').upper())
             for flag in flags)
    return OWN & {_PREFIX + name for name in names}
