# shellcheck shell=bash disable=SC2016
# Copyright the nova-pycontainer developers
# SPDX-License-Identifier: Apache-2.0
#
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

# Sourced. Tells from which Debian mirror this machine itself is installed,
# so that no host name stands in this repository and a site's own mirror,
# proxy and certificates are used without being asked for.

# debian_mirror main|security
#   The base URI of Debian's archive as apt is configured here.
#   NOVA_PYCONTAINER_DEBIAN_MIRROR and NOVA_PYCONTAINER_DEBIAN_SECURITY_MIRROR
#   override it (a host that is not Debian has no such entry).
#   Prints nothing and returns 1 if there is none.
debian_mirror() {
    local wanted=$1 given='' found
    case $wanted in
    main) given=${NOVA_PYCONTAINER_DEBIAN_MIRROR:-} ;;
    security) given=${NOVA_PYCONTAINER_DEBIAN_SECURITY_MIRROR:-} ;;
    esac
    if [ -n "$given" ]; then
        echo "${given%/}"
        return 0
    fi
    # CODENAME is the suite's real name ("bookworm", "bookworm-security"),
    # whatever word (stable, a code name) the sources use for it. It is known
    # only once apt has fetched an index, hence RELEASE as the fallback.
    found=$(apt-get indextargets \
            --format '$(ORIGIN) $(CODENAME) $(RELEASE) $(REPO_URI)' \
            'Created-By: Packages' 2>/dev/null \
        | awk -v wanted="$wanted" '
            NF == 4 && $1 == "Debian" {
                kind = ($2 $3) ~ /-security/ ? "security" : "main"
                if (kind == wanted) { print $4; exit }
            }')
    [ -n "$found" ] || return 1
    echo "${found%/}"
}

# debian_sources SUITE
#   sources.list lines of SUITE with its updates and, where this machine has
#   an archive of security updates configured, that.
debian_sources() {
    local suite=$1 main security
    if ! main=$(debian_mirror main); then
        echo "apt on this machine has no Debian archive with fetched lists:" \
            "run 'apt-get update' first, or set" \
            "NOVA_PYCONTAINER_DEBIAN_MIRROR" >&2
        return 1
    fi
    echo "deb $main $suite main"
    # sid has neither updates nor security.
    [ "$suite" != sid ] || return 0
    echo "deb $main $suite-updates main"
    if security=$(debian_mirror security); then
        echo "deb $security $suite-security main"
    fi
}

# apt_acquire_options
#   One line "Key "value";" for each setting of this machine's apt that says
#   how to reach the mirror (proxy, time-outs, certificates) or how to judge
#   its dates: a second apt with its own root does not see them.
apt_acquire_options() {
    apt-config dump \
        | grep -E '^Acquire::(https?::|Check-|Retries|ForceIPv|By-Hash)' \
        | grep -v '""' || true
}

# debian_release_time SUITE
#   Unix time of the suite's Release file: nothing in the archive is newer.
debian_release_time() {
    local suite=$1 main tmp when
    main=$(debian_mirror main) || return 1
    tmp=$(mktemp -d)
    # apt's own downloader: it knows the proxy and the certificates.
    if ! /usr/lib/apt/apt-helper -o APT::Sandbox::User=root download-file \
            "$main/dists/$suite/InRelease" "$tmp/InRelease" >"$tmp/log" 2>&1
    then
        cat "$tmp/log" >&2
        rm -rf "$tmp"
        return 1
    fi
    when=$(sed -n 's/^Date: //p' "$tmp/InRelease")
    rm -rf "$tmp"
    date -u -d "$when" +%s
}

# debian_bootstrap SOURCES TARGET SUITE ARGUMENT...
#   mmdebstrap with this machine's mirror and ways to it. SOURCES is the file
#   that the sources.list is written to.
debian_bootstrap() {
    local sources=$1 target=$2 suite=$3 line
    local -a options=()
    shift 3
    while IFS= read -r line; do
        [ -z "$line" ] || options+=("--aptopt=$line")
    done < <(apt_acquire_options)
    debian_sources "$suite" >"$sources"
    mmdebstrap --quiet --mode=root --aptopt='Acquire::Retries "3"' \
        "${options[@]}" "$@" "$suite" "$target" "$sources"
}
