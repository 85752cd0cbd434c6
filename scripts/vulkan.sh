#!/bin/bash
# vulkan.sh [COMMAND…]: runs COMMAND (usually cargo) so that what cargo runs finds a Vulkan adapter.
#
#  1. a hardware adapter with its driver installed, or a recent software driver of the system: used as it is;
#  2. otherwise, on Debian and its relatives, Mesa's lavapipe (software Vulkan) is unpacked once under
#     target/lavapipe with its own C library and Vulkan loader. Nothing on the system changes, no root is needed,
#     and no libvulkan has to be there. Programs are started through cargo's `runner` setting;
#  3. elsewhere: says what to install.
#
# LAVENDER_VULKAN=system never unpacks; LAVENDER_VULKAN=software always uses the unpacked driver.
# Without COMMAND: only says which driver is used.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
home=${CARGO_TARGET_DIR:-$root/target}/lavapipe
[[ $home = /* ]] || home=$PWD/$home
choice=${LAVENDER_VULKAN:-auto}
oldest_mesa=24 # older lavapipe lacks what the fast kernels need and is several times slower

say() { printf 'vulkan: %s\n' "$*" >&2; }
fail() { printf 'vulkan: error: %s\n' "$*" >&2; exit 1; }

has_loader() {
  ldconfig -p 2>/dev/null | grep -q 'libvulkan\.so\.1' && return
  local d
  for d in /usr/lib /usr/lib64 /usr/lib/*-linux-gnu /usr/local/lib ${LD_LIBRARY_PATH:+${LD_LIBRARY_PATH//:/ }}; do
    [ -e "$d/libvulkan.so.1" ] && return
  done
  return 1
}

# Manifests of the installed drivers, one file a line; $1 is a pattern on their names.
manifests() {
  { tr : '\n' <<< "${VK_DRIVER_FILES:-}:${VK_ICD_FILENAMES:-}"
    find /usr/share/vulkan/icd.d /usr/local/share/vulkan/icd.d /etc/vulkan/icd.d \
      "${XDG_DATA_HOME:-${HOME:-/nonexistent}/.local/share}/vulkan/icd.d" -name '*.json' 2>/dev/null || true
  } | grep -E "/[^/]*($1)[^/]*\$" || true
}

# A graphics device whose driver is installed. A manifest alone says nothing: distributions install all of them.
hardware() {
  local device vendor pattern
  [ -e /dev/nvidiactl ] && [ -n "$(manifests 'nvidia')" ] && { echo nvidia; return; }
  [ -e /dev/dxg ] && [ -n "$(manifests 'dzn')" ] && { echo dzn; return; }
  for device in /sys/class/drm/renderD*/device; do
    [ -e "$device" ] || continue
    vendor=$(cat "$device/vendor" 2>/dev/null || echo platform)
    case $vendor in
      0x1002) pattern='radeon|amd' ;;
      0x8086) pattern='intel' ;;
      0x10de) pattern='nvidia|nouveau' ;;
      0x1af4) pattern='virtio|gfxstream' ;;
      platform) pattern='freedreno|panfrost|broadcom|asahi|powervr|tegra|imagination' ;;
      *) continue ;;
    esac
    [ -r "/dev/dri/$(basename "$(dirname "$device")")" ] || continue
    [ -n "$(manifests "$pattern")" ] && { echo "${pattern%%|*}"; return; }
  done
  return 1
}

# The system's own lavapipe, where it is recent.
software() {
  [ -n "$(manifests 'lvp')" ] || return 1
  local version
  version=$(dpkg-query -W -f '${Version}' mesa-vulkan-drivers 2>/dev/null ||
    rpm -q --qf '%{VERSION}' mesa-vulkan-drivers 2>/dev/null ||
    pacman -Q vulkan-swrast 2>/dev/null | cut -d' ' -f2) || return 1
  version=${version#*:}
  [ "${version%%[.-]*}" -ge "$oldest_mesa" ] 2>/dev/null && echo "lavapipe $version"
}

# The Debian mirror that this machine's apt is set up with, and the key its lists are signed with.
debian_mirror() {
  grep -rhoE '^(URIs: *|deb +(\[[^]]*\] +)?)[a-z+]+:/[^ ]*/debian/?( |$)' \
    /etc/apt/sources.list /etc/apt/sources.list.d 2>/dev/null | grep -oE '[a-z+]+:/[^ ]+' | head -n 1
}

unpack() {
  command -v apt-get > /dev/null && command -v dpkg-deb > /dev/null || return 1
  local options sources mirror release='' packages work=$home.partial
  rm -rf "$work"
  mkdir -p "$work"/{lists/partial,cache/archives/partial,debs,root}
  : > "$work/status"
  # An empty status file makes apt resolve everything down to the C library, so that nothing of the system is used.
  options=(-o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache" -o "Dir::State::status=$work/status"
    -o "Acquire::Languages=none" -o "APT::Sandbox::User=$(id -un)" -o "Debug::NoLocking=1")
  mirror=$(debian_mirror || true)
  if [ -n "$mirror" ]; then
    # Debian: from the newest suites, whatever release this machine runs.
    sources=$work/sources.list
    local suite
    for suite in trixie trixie-updates trixie-backports; do
      printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' "$mirror" "$suite"
    done > "$sources"
    options+=(-o "Dir::Etc::sourcelist=$sources" -o "Dir::Etc::sourceparts=/dev/null")
    release=trixie-backports
  fi
  say "no usable Vulkan driver: unpacking Mesa's software driver under ${home#"$PWD"/} (once, about 60 MB)"
  apt-get "${options[@]}" update -qq > "$work/apt.log" 2>&1 ||
    { tail -n 3 "$work/apt.log" >&2; fail "apt-get update failed (log: $work/apt.log); is there a network?"; }
  packages=$(apt-get "${options[@]}" ${release:+-t "$release"} -s install --no-install-recommends \
    mesa-vulkan-drivers 2>> "$work/apt.log" | awk '/^Inst/ {v = $3; sub(/^\(/, "", v); print $2 "=" v}')
  [ -n "$packages" ] || fail "apt knows no mesa-vulkan-drivers here (log: $work/apt.log)"
  # shellcheck disable=SC2086 # one argument a package
  (cd "$work/debs" && apt-get "${options[@]}" download -qq $packages >> "$work/apt.log" 2>&1) ||
    { tail -n 3 "$work/apt.log" >&2; fail "the driver's packages could not be downloaded (log: $work/apt.log)"; }
  local package
  for package in "$work"/debs/*.deb; do dpkg-deb -x "$package" "$work/root"; done

  # Written with their final place in mind: the folder is renamed once it is whole.
  local driver loader libraries final=$home/root
  driver=$(cd "$work/root" && find . -name 'libvulkan_lvp.so' | head -n 1 | cut -c3-)
  [ -n "$driver" ] || fail "the packages hold no libvulkan_lvp.so (log: $work/apt.log)"
  libraries=$(dirname "$driver")
  loader=$(cd "$work/root" && find "$libraries" lib lib64 -name 'ld-linux*.so*' 2> /dev/null | head -n 1)
  [ -n "$loader" ] || fail "the packages hold no program loader (log: $work/apt.log)"
  printf '{"file_format_version": "1.0.0", "ICD": {"api_version": "1.3.0", "library_path": "%s"}}\n' \
    "$final/$driver" > "$work/lavapipe.json"
  cat > "$work/run" <<RUN
#!/bin/bash
# run PROGRAM [ARGS…]: starts PROGRAM with the unpacked C library, Vulkan loader and software driver.
export VK_DRIVER_FILES='$home/lavapipe.json' VK_ICD_FILENAMES='$home/lavapipe.json'
program=\$1
shift
exec '$final/$loader' --library-path '$final/$libraries' "\$program" "\$@"
RUN
  chmod +x "$work/run"
  rm -rf "$work"/{lists,cache,debs,status,sources.list} "$home"
  mv "$work" "$home"
}

driver=''
if [ "$(uname -s)" != Linux ]; then
  say "$(uname -s): the system's own graphics interface is used"
  choice=system
elif [ "$choice" != software ]; then
  if has_loader && driver=$(hardware); then
    say "hardware adapter with its driver ($driver)"
    choice=system
  elif has_loader && driver=$(software); then
    say "the system's software driver ($driver)"
    choice=system
  elif [ "$choice" = system ]; then
    say "no driver found, going on as asked (LAVENDER_VULKAN=system)"
  fi
fi

if [ "$choice" != system ]; then
  if [ ! -x "$home/run" ] && ! unpack; then
    fail "no usable Vulkan driver, and no apt to unpack one with. Install your graphics card's Vulkan driver, or the \
software one, and try again:
  Fedora: dnf install vulkan-loader mesa-vulkan-drivers     Arch: pacman -S vulkan-icd-loader vulkan-swrast
  openSUSE: zypper install libvulkan1 libvulkan_lvp         Alpine: apk add vulkan-loader mesa-vulkan-swrast"
  fi
  say "software driver in ${home#"$PWD"/}"
  # The triple that cargo builds for names the setting.
  triple=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
  export "CARGO_TARGET_${triple}_RUNNER=$home/run"
fi

if [ $# -gt 0 ]; then exec "$@"; fi
