// CUDA's names for a host compiler: stream/gpu/kernels.cu behind this is a shared library that the tests call.
// Threads run one after the other; with LANES > 1 those of a warp run at the same time and meet at __syncwarp.
#pragma once
#include <barrier>
#include <memory>
#include <thread>
#include <vector>

#ifndef LANES
#define LANES 1
#endif
#define __device__
#define __global__

struct Index {
    unsigned x, y;
};
static thread_local Index threadIdx, blockIdx;
static Index blockDim, gridDim;
static std::unique_ptr<std::barrier<>> warp;

static inline void __syncwarp() {
    if (LANES > 1) warp->arrive_and_wait();
}

template <typename T>
static inline T atomicAdd(T* at, T value) {
    return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

static inline int atomicMax(int* at, int value) {
    int before = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (before < value && !__atomic_compare_exchange_n(at, &before, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return before;
}

// Every thread of a grid.
template <typename Kernel>
static void run(Index grid, unsigned threads, Kernel kernel) {
    blockDim = {threads, 1};
    gridDim = grid;
    for (unsigned y = 0; y < grid.y; y++) {
        for (unsigned x = 0; x < grid.x; x++) {
            for (unsigned first = 0; first < threads; first += LANES) {
                auto lane = [=](unsigned number) {
                    blockIdx = {x, y};
                    threadIdx = {first + number, 0};
                    kernel();
                };
                if (LANES == 1) {
                    lane(0);
                    continue;
                }
                warp = std::make_unique<std::barrier<>>(LANES);
                std::vector<std::thread> lanes;
                for (unsigned number = 0; number < LANES; number++) {
                    lanes.emplace_back([=] {
                        lane(number);
                        warp->arrive_and_drop();
                    });
                }
                for (auto& thread : lanes) thread.join();
            }
        }
    }
}
