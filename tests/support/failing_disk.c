/* A disk that refuses writes. Loaded before the C library, it makes write, pwrite and fsync of files in a
 * folder `checkpoints` fail while the file named by REFUSE exists. It holds "ERRNO RANK"; RANK -1 is every rank. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int refused(int file) {
    char link[64], path[4096];
    const char *flag = getenv("REFUSE"), *own = getenv("PMI_RANK");
    int number = 0, rank = -1;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (!flag || length < 0) return 0;
    path[length] = 0;
    if (!strstr(path, "/checkpoints/")) return 0;
    FILE *stream = fopen(flag, "r");
    if (!stream) return 0;
    int found = fscanf(stream, "%d %d", &number, &rank);
    fclose(stream);
    if (found != 2 || (rank >= 0 && (!own || atoi(own) != rank))) return 0;
    errno = number;
    return 1;
}

#define NEXT(name) dlsym(RTLD_NEXT, name)

ssize_t write(int file, const void *data, size_t size) {
    ssize_t (*next)(int, const void *, size_t) = NEXT("write");
    return refused(file) ? -1 : next(file, data, size);
}

ssize_t pwrite(int file, const void *data, size_t size, off_t place) {
    ssize_t (*next)(int, const void *, size_t, off_t) = NEXT("pwrite");
    return refused(file) ? -1 : next(file, data, size, place);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t place) {
    ssize_t (*next)(int, const void *, size_t, off64_t) = NEXT("pwrite64");
    return refused(file) ? -1 : next(file, data, size, place);
}

int fsync(int file) {
    int (*next)(int) = NEXT("fsync");
    return refused(file) ? -1 : next(file);
}
