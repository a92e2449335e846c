// Frames on the GPU: from bitshuffle-LZ4 payloads, as they were received, to rows of bright-field pixels and sums.
//
// CUDA C++ for NVRTC (no headers). The tests compile this very file with the host's compiler, behind a few lines that
// give threads and atomics their names (tests/gpu_host.h), and compare every result with the CPU decoder.
//
// `status` of a frame: those of stream/unpack.py (0 sound, 2 damaged), and ELSEWHERE: its blocks are not the size of the
// batch's others, the CPU decodes it. Whatever the bytes say, nothing outside the announced ranges is read or written.

#ifndef LANES
#define LANES 32  // threads that unpack one LZ4 block together: a warp; the tests on the host have other numbers
#endif

enum { SOUND = 0, DAMAGED = 2, ELSEWHERE = 4 };

// LZ4's rules for the end of a block, as in stream/unpack.py.
enum { LAST_LITERALS = 5, MATCH_LIMIT = 12 };

typedef unsigned char byte;
typedef unsigned long long u64;

static __device__ u64 big_endian(const byte* at, int count) {
    u64 value = 0;
    for (int i = 0; i < count; i++) value = value << 8 | at[i];
    return value;
}

// One thread a frame: where its LZ4 blocks lie. `offsets`, `sizes` (frames): the payloads in `slab`. Fills `starts` and
// `lengths` (frames, blocks), length -1 in a frame that is not to be unpacked, sets `status` and clears `sums`.
// What fills no group of 8 pixels travels as it is, and is copied to the end of the frame in `planes`.
extern "C" __global__ void find_blocks(
    const byte* slab, const long long* offsets, const long long* sizes, int frames, long long frame_bytes,
    long long packed_bytes, int block_bytes, int blocks, int default_block_bytes, int* starts, int* lengths,
    byte* planes, int* status, u64* sums) {
    int frame = blockIdx.x * blockDim.x + threadIdx.x;
    if (frame >= frames) return;
    for (int i = 0; i < 4; i++) sums[4 * frame + i] = 0;
    starts += (long long)frame * blocks;
    lengths += (long long)frame * blocks;
    long long at = offsets[frame], end = at + sizes[frame];
    int found = DAMAGED;
    if (end - at >= 12 && big_endian(slab + at, 8) == (u64)frame_bytes) {
        long long block = (long long)big_endian(slab + at + 8, 4);
        if (block == 0) block = default_block_bytes;
        at += 12;
        found = block == block_bytes ? SOUND : ELSEWHERE;
        for (int b = 0; b < blocks && found == SOUND; b++) {
            long long length = end - at >= 4 ? (long long)big_endian(slab + at, 4) : end;
            at += 4;
            if (length > end - at) {
                found = DAMAGED;
            } else {
                starts[b] = (int)at;
                lengths[b] = (int)length;
                at += length;
            }
        }
        if (found == SOUND && end - at != frame_bytes - packed_bytes) found = DAMAGED;
    }
    status[frame] = found;
    if (found == SOUND) {
        byte* tail = planes + frame * frame_bytes + packed_bytes;
        for (int i = 0; i < frame_bytes - packed_bytes; i++) tail[i] = slab[at + i];
    } else {
        for (int b = 0; b < blocks; b++) lengths[b] = -1;
    }
}

// The bytes that continue a length of 15; false where the input ends first, or the length is beyond any use.
static __device__ bool longer(const byte* in, int& at, int end, int most, int& length) {
    byte more;
    do {
        if (at >= end || length > most) return false;
        more = in[at++];
        length += more;
    } while (more == 255);
    return true;
}

// Unpack an LZ4 block of `size` bytes into exactly `wanted`. All LANES threads of a warp run this together: each parses
// every token, and copies every LANES-th byte. Returns false, the same for all of them, where the block does not fit.
// Literals and matches are checked against both ends before a byte of them is copied.
static __device__ bool unpack_lz4(const byte* in, int size, byte* out, int wanted, int lane) {
    int at = 0, done = 0;
    while (at < size) {
        int token = in[at++];
        int literals = token >> 4;
        if (literals == 15 && !longer(in, at, size, wanted, literals)) return false;
        if (literals > size - at || literals > wanted - done) return false;
        for (int i = lane; i < literals; i += LANES) out[done + i] = in[at + i];
        at += literals;
        done += literals;
        if (at == size) return done == wanted;
        if (at > size - 3 - LAST_LITERALS || done > wanted - MATCH_LIMIT) return false;
        int offset = in[at] | in[at + 1] << 8;
        // The format forbids an offset of 0; the LZ4 library lets it pass, with undefined bytes.
        if (offset == 0 || offset > done) return false;
        at += 2;
        int match = token & 15;
        if (match == 15 && !longer(in, at, size - LAST_LITERALS + 1, wanted, match)) return false;
        match += 4;
        if (match > wanted - LAST_LITERALS - done) return false;
        // What other lanes wrote, up to here, is read now. A match that overlaps itself repeats the `offset` bytes
        // before it, so that no byte depends on another of the same match.
        __syncwarp();
        const byte* from = out + done - offset;
        if (offset >= match) {
            for (int i = lane; i < match; i += LANES) out[done + i] = from[i];
        } else {
            for (int i = lane; i < match; i += LANES) out[done + i] = from[i % offset];
        }
        done += match;
    }
    return false;
}

// One warp an LZ4 block: bit planes into `planes` (frames, frame_bytes). `wanted_blocks` (blocks): 0 where no pixel of
// a block is wanted, which is then left as it is.
extern "C" __global__ void unpack_blocks(
    const byte* slab, const int* starts, const int* lengths, const byte* wanted_blocks, int frames,
    long long frame_bytes, long long packed_bytes, int block_bytes, int blocks, byte* planes, int* status) {
    long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    long long which = thread / LANES;
    if (which >= (long long)frames * blocks) return;
    int frame = (int)(which / blocks), b = (int)(which % blocks), lane = (int)(thread % LANES);
    if (lengths[which] < 0 || !wanted_blocks[b]) return;
    long long first = (long long)b * block_bytes;
    long long left = packed_bytes - first;
    int wanted = left < block_bytes ? (int)left : block_bytes;
    byte* out = planes + frame * frame_bytes + first;
    if (!unpack_lz4(slab + starts[which], lengths[which], out, wanted, lane) && lane == 0) {
        atomicMax(status + frame, (int)DAMAGED);
    }
}

// One group of 8 pixels from its bit planes, `stride` bytes apart. Most planes of most groups are 0.
template <typename Pixel>
static __device__ void transpose(const byte* planes, long long stride, Pixel* values) {
#pragma unroll
    for (int plane = 0; plane < (int)(8 * sizeof(Pixel)); plane++) {
        unsigned bits = planes[plane * stride];
        if (bits) {
#pragma unroll
            for (int j = 0; j < 8; j++) values[j] |= (Pixel)((Pixel)(bits >> j & 1) << plane);
        }
    }
}

// A frame a blockIdx.x, shared out among blockIdx.y; each thread takes groups of 8 pixels.
template <typename Pixel>
static __device__ void gather(
    const byte* planes, const int* status, const long long* targets, long long frame_bytes, long long packed_bytes,
    int block_bytes, int pixels, int width, const int* bf_slot, int bf_pixels, int maximum_is_masked, Pixel* rows,
    u64* sums, u64* pattern) {
    int frame = blockIdx.x;
    if (status[frame] != SOUND) return;
    planes += frame * frame_bytes;
    Pixel* row_out = rows + targets[frame] * bf_pixels;
    const int packed = (int)(packed_bytes / sizeof(Pixel)), block = block_bytes / (int)sizeof(Pixel);
    const Pixel largest = (Pixel)~(Pixel)0;
    u64 total = 0, bright = 0, moment_row = 0, moment_column = 0;
    int groups = (pixels + 7) / 8;
    for (int group = blockIdx.y * blockDim.x + threadIdx.x; group < groups; group += gridDim.y * blockDim.x) {
        int first = 8 * group, count = 8;
        Pixel values[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        if (first < packed) {
            int start = first / block * block;
            int here = packed - start < block ? packed - start : block;
            transpose(planes + (long long)start * sizeof(Pixel) + (first - start) / 8, here / 8, values);
        } else {  // the last pixels, as they are, little-endian
            count = pixels - first;
            for (int i = 0; i < count * (int)sizeof(Pixel); i++) {
                values[i / sizeof(Pixel)] |= (Pixel)((Pixel)planes[packed_bytes + i] << 8 * (i % sizeof(Pixel)));
            }
        }
        int row = first / width, column = first - row * width;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (j < count) {
                int slot = bf_slot[first + j];
                u64 value = slot == -2 || (maximum_is_masked && values[j] == largest) ? 0 : values[j];
                if (slot >= 0) {
                    row_out[slot] = (Pixel)value;
                    bright += value;
                }
                if (value) {
                    total += value;
                    moment_row += value * row;
                    moment_column += value * column;
                    atomicAdd(pattern + first + j, value);
                }
                if (++column == width) {
                    column = 0;
                    row++;
                }
            }
        }
    }
    if (total) {  // sums of integers: in whichever order, the same
        atomicAdd(sums + 4 * frame, total);
        atomicAdd(sums + 4 * frame + 1, bright);
        atomicAdd(sums + 4 * frame + 2, moment_row);
        atomicAdd(sums + 4 * frame + 3, moment_column);
    }
}

// Bit planes into pixels: the bright-field ones into `rows[targets[frame]]` (positions, bf_pixels), all into `sums`
// (frames, 4: total, bright field, first moments) and `pattern` (pixels). `bf_slot` (pixels): a pixel's place in the
// row, -1 outside the bright field, -2 masked. Frames that are not sound are left out everywhere.
#define GATHER(NAME, PIXEL)                                                                                            \
    extern "C" __global__ void NAME(                                                                                   \
        const byte* planes, const int* status, const long long* targets, long long frame_bytes,                        \
        long long packed_bytes, int block_bytes, int pixels, int width, const int* bf_slot, int bf_pixels,             \
        int maximum_is_masked, PIXEL* rows, u64* sums, u64* pattern) {                                                 \
        gather<PIXEL>(planes, status, targets, frame_bytes, packed_bytes, block_bytes, pixels, width, bf_slot,         \
                      bf_pixels, maximum_is_masked, rows, sums, pattern);                                              \
    }
GATHER(gather_u1, unsigned char)
GATHER(gather_u2, unsigned short)
GATHER(gather_u4, unsigned int)

// Rows that the CPU decoded, `row_bytes` each, to their places: a frame a blockIdx.x.
extern "C" __global__ void place_rows(const byte* from, const long long* targets, long long row_bytes, byte* rows) {
    from += blockIdx.x * row_bytes;
    rows += targets[blockIdx.x] * row_bytes;
    for (long long i = threadIdx.x; i < row_bytes; i += blockDim.x) rows[i] = from[i];
}
