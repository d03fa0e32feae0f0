// The order of a source's windows: keyed permutations, without tables.
#pragma once

#include <array>
#include <cstdint>

namespace cpt {

// Steps of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits that mixes every bit.
constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15ULL;

constexpr std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// The `number`-th key that follows from `key`.
constexpr std::uint64_t derive(std::uint64_t key, std::uint64_t number) { return mix(key + kGolden * (number + 1)); }

// A keyed permutation of 0..size-1: a balanced Feistel network over the next even power of two,
// walked along its cycle until the value is below `size` (fewer than 4 steps on average).
class Permutation {
 public:
  Permutation(std::uint64_t size, std::uint64_t key) : size_(size) {
    while (half_bits_ < 31 && (std::uint64_t{1} << (2 * half_bits_)) < size) ++half_bits_;
    for (std::uint64_t round = 0; round < keys_.size(); ++round) keys_[round] = derive(key, round);
  }

  std::uint64_t operator()(std::uint64_t position) const {
    do position = once(position);
    while (position >= size_);
    return position;
  }

 private:
  std::uint64_t once(std::uint64_t value) const {
    const std::uint64_t mask = (std::uint64_t{1} << half_bits_) - 1;
    std::uint64_t left = value >> half_bits_;
    std::uint64_t right = value & mask;
    for (const std::uint64_t key : keys_) {
      const std::uint64_t mixed = left ^ (mix(key ^ right) & mask);
      left = right;
      right = mixed;
    }
    return (left << half_bits_) | right;
  }

  std::uint64_t size_;
  unsigned half_bits_ = 1;
  std::array<std::uint64_t, 6> keys_{};
};

}  // namespace cpt
