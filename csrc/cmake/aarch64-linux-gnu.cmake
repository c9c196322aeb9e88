# Cross-compilation for AArch64 Linux with Debian's g++-aarch64-linux-gnu; programs are linked
# statically, so that qemu-aarch64 needs no system of theirs to run them.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
