/* libnvidia-ml.so.1 of a node of 8 H100s of 80 GB, connected by NVLink. It only tells: nothing can run on them.
   Signatures and numbers: NVIDIA's nvml.h. Tells what vLLM asks of a node when it makes its configuration. */
#include <stdio.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, GPUS = 8 };
struct memory { unsigned long long total, free, used; };

int nvmlInit_v2(void) { return SUCCESS; }
int nvmlInitWithFlags(unsigned flags) { return SUCCESS; }
int nvmlInit(void) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return "an error of the stand-in for NVML"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = GPUS; return SUCCESS; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { snprintf(text, size, "580.65.06"); return SUCCESS; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13000; return SUCCESS; }

/* The handle of GPU number n is n + 1. */
int nvmlDeviceGetHandleByIndex_v2(unsigned number, void **gpu) {
    *gpu = (void *)(long)(number + 1);
    return number < GPUS ? SUCCESS : INVALID_ARGUMENT;
}
int nvmlDeviceGetIndex(void *gpu, unsigned *number) { *number = (unsigned)((long)gpu - 1); return SUCCESS; }
int nvmlDeviceGetName(void *gpu, char *text, unsigned size) { snprintf(text, size, "NVIDIA H100 80GB HBM3"); return SUCCESS; }
int nvmlDeviceGetUUID(void *gpu, char *text, unsigned size) {
    snprintf(text, size, "GPU-%08ld-0000-0000-0000-000000000000", (long)gpu - 1);
    return SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(void *gpu, int *major, int *minor) { *major = 9; *minor = 0; return SUCCESS; }
int nvmlDeviceGetMemoryInfo(void *gpu, struct memory *memory) {
    *memory = (struct memory){85520809984ULL, 85000000000ULL, 520809984ULL};
    return SUCCESS;
}
int nvmlDeviceGetP2PStatus(void *gpu, void *other, int what, int *status) { *status = 0; return SUCCESS; }
int nvmlDeviceGetMigMode(void *gpu, unsigned *now, unsigned *next) { return NOT_SUPPORTED; }
