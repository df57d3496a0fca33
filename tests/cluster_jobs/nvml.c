/* A driver's management library for machines without one: the functions that Ray's reporter cannot do without, as its
 * pynvml declares them. Ray takes the missing ones (power, temperature, MIG, load of a process) as of an older driver.
 * Built with -DUTILIZATION=PERCENT,… -DUSED=BYTES,… (one value for each device). */
#include <stdio.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2 };

struct memory { unsigned long long total, free, used; };
struct utilization { unsigned gpu, memory; };

static const unsigned utilization[] = {UTILIZATION};
static const unsigned long long used[] = {USED};
static const unsigned long long total = 80ULL << 30;
enum { DEVICES = sizeof used / sizeof *used };
static char devices[DEVICES]; /* a handle is the address of one */

int nvmlInitWithFlags(unsigned flags) { (void)flags; return SUCCESS; }

int nvmlShutdown(void) { return SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = DEVICES;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, char **device) {
    if (index >= DEVICES) return INVALID_ARGUMENT;
    *device = &devices[index];
    return SUCCESS;
}

int nvmlDeviceGetName(char *device, char *name, unsigned length) {
    (void)device;
    snprintf(name, length, "NVIDIA FAKE-80GB");
    return SUCCESS;
}

int nvmlDeviceGetUUID(char *device, char *uuid, unsigned length) {
    snprintf(uuid, length, "GPU-fake-%d", (int)(device - devices));
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(char *device, struct memory *memory) {
    *memory = (struct memory){total, total - used[device - devices], used[device - devices]};
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(char *device, struct utilization *rates) {
    *rates = (struct utilization){utilization[device - devices], 0};
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(char *device, unsigned *count, void *processes) {
    (void)device, (void)processes;
    *count = 0;
    return SUCCESS;
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(char *device, unsigned *count, void *processes) {
    return nvmlDeviceGetComputeRunningProcesses_v3(device, count, processes);
}
