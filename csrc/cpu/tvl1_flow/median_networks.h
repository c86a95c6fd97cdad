// The median filters of TV-L1 flow as networks of compare-exchanges, for the CPU and the CUDA kernel.
#pragma once

namespace cpr::tvl1 {

// A network is a list of pairs of wires; each pair is put in order, the lesser value on the first wire.
using Wire = unsigned char;
constexpr Wire kSort3[][2] = {{0, 1}, {1, 2}, {0, 1}};
constexpr Wire kSort5[][2] = {{0, 1}, {3, 4}, {2, 4}, {2, 3}, {0, 3}, {0, 2}, {1, 4}, {1, 3}, {1, 2}};
// Input: wires 3 r + c, with each column sorted. The median is the median of (the greatest of row 0, the median of
// row 1, the least of row 2).
constexpr Wire kMedian9[][2] = {{0, 1}, {1, 2}, {3, 4}, {4, 5}, {3, 4}, {7, 8}, {6, 7}, {2, 4}, {4, 6}, {2, 4}};
constexpr int kMedian9Wire = 4;
// Input: wires 5 r + c, with each column sorted. The network was pruned from sorts of the rows and a median of the 13
// wires that can hold it: comparators were removed while all 6^5 inputs of zeros and ones with sorted columns still
// gave the median (0-1 principle). 88 min/max operations remain.
constexpr Wire kMedian25[][2] = {{0, 1},   {3, 4},   {2, 3},   {0, 3},   {1, 4},   {1, 3},   {5, 6},   {8, 9},
                                 {7, 9},   {5, 8},   {6, 9},   {6, 8},   {6, 7},   {10, 11}, {13, 14}, {12, 14},
                                 {12, 13}, {10, 12}, {11, 14}, {11, 12}, {15, 16}, {17, 19}, {17, 18}, {15, 18},
                                 {15, 17}, {16, 19}, {16, 18}, {23, 24}, {22, 24}, {22, 23}, {20, 23}, {20, 22},
                                 {21, 22}, {11, 13}, {15, 11}, {12, 13}, {13, 17}, {11, 7},  {13, 9},  {7, 16},
                                 {8, 13},  {7, 8},   {12, 13}, {13, 16}, {8, 3},   {20, 12}, {8, 20},  {12, 13},
                                 {13, 3},  {20, 4},  {12, 13}, {20, 12}, {13, 4},  {12, 21}, {12, 13}, {13, 21}};
constexpr int kMedian25Wire = 13;

}  // namespace cpr::tvl1
