// SHA-256 (FIPS 180-4) whose state can be put down and taken up, by the processor's own instructions where it has them.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>
#define CPT_SHA_INSTRUCTIONS 1
#endif

namespace cpt {

namespace sha256_detail {

alignas(16) constexpr std::uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

using State = std::array<std::uint32_t, 8>;

inline std::uint32_t rotate(std::uint32_t word, int bits) { return word >> bits | word << (32 - bits); }

inline void compress_plain(State& state, const unsigned char* data, std::size_t blocks) {
  for (; blocks != 0; --blocks, data += 64) {
    std::uint32_t w[64];
    for (int k = 0; k < 16; ++k)
      w[k] = static_cast<std::uint32_t>(data[4 * k]) << 24 | static_cast<std::uint32_t>(data[4 * k + 1]) << 16 |
             static_cast<std::uint32_t>(data[4 * k + 2]) << 8 | data[4 * k + 3];
    for (int k = 16; k < 64; ++k) {
      const std::uint32_t a = w[k - 15], b = w[k - 2];
      w[k] = w[k - 16] + (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) + w[k - 7] + (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
    }
    State s = state;
    for (int k = 0; k < 64; ++k) {
      const std::uint32_t one = s[7] + (rotate(s[4], 6) ^ rotate(s[4], 11) ^ rotate(s[4], 25)) +
                                ((s[4] & s[5]) ^ (~s[4] & s[6])) + kRound[k] + w[k];
      const std::uint32_t two = (rotate(s[0], 2) ^ rotate(s[0], 13) ^ rotate(s[0], 22)) +
                                ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
      s = {one + two, s[0], s[1], s[2], s[3] + one, s[4], s[5], s[6]};
    }
    for (std::size_t k = 0; k < 8; ++k) state[k] += s[k];
  }
}

#ifdef CPT_SHA_INSTRUCTIONS
__attribute__((target("sha,sse4.1"))) inline void compress_fast(State& state, const unsigned char* data,
                                                                std::size_t blocks) {
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  __m128i* const words = reinterpret_cast<__m128i*>(state.data());
  // The instructions want the words as (a b e f) and (c d g h).
  const __m128i cdab = _mm_shuffle_epi32(_mm_loadu_si128(words), 0xB1);
  const __m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128(words + 1), 0x1B);
  __m128i abef = _mm_alignr_epi8(cdab, efgh, 8);
  __m128i cdgh = _mm_blend_epi16(efgh, cdab, 0xF0);
  for (; blocks != 0; --blocks, data += 64) {
    const __m128i abef_before = abef, cdgh_before = cdgh;
    __m128i m[4];
    for (int k = 0; k < 4; ++k)
      m[k] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data) + k), big_endian);
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) {
      __m128i& now = m[k & 3];
      const __m128i round =
          _mm_add_epi32(now, _mm_load_si128(reinterpret_cast<const __m128i*>(&kRound[4 * k])));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, round);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(round, 0x0E));
      const __m128i last = m[(k + 3) & 3];
      now = _mm_sha256msg2_epu32(
          _mm_add_epi32(_mm_sha256msg1_epu32(now, m[(k + 1) & 3]), _mm_alignr_epi8(last, m[(k + 2) & 3], 4)), last);
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  const __m128i feba = _mm_shuffle_epi32(abef, 0x1B);
  const __m128i dchg = _mm_shuffle_epi32(cdgh, 0xB1);
  _mm_storeu_si128(words, _mm_blend_epi16(feba, dchg, 0xF0));
  _mm_storeu_si128(words + 1, _mm_alignr_epi8(dchg, feba, 8));
}

inline bool has_instructions() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b >> 29 & 1) != 0;
}
#endif

using Compress = void (*)(State& state, const unsigned char* data, std::size_t blocks);

inline Compress best_compress() {
#ifdef CPT_SHA_INSTRUCTIONS
  static const bool fast = has_instructions();
  if (fast) return compress_fast;
#endif
  return compress_plain;
}

}  // namespace sha256_detail

class Sha256 {
 public:
  using Digest = std::array<unsigned char, 32>;

  // Without `instructions` the portable way is taken, which gives the same.
  explicit Sha256(bool instructions = true)
      : compress_(instructions ? sha256_detail::best_compress() : sha256_detail::compress_plain) {}

  void update(std::string_view bytes) {
    auto* data = reinterpret_cast<const unsigned char*>(bytes.data());
    std::size_t left = bytes.size();
    if (left == 0) return;
    const auto held = static_cast<std::size_t>(length_ % 64);
    length_ += left;
    if (held != 0) {
      const std::size_t taken = std::min(left, 64 - held);
      std::memcpy(pending_.data() + held, data, taken);
      if (held + taken < 64) return;
      compress_(state_, pending_.data(), 1);
      data += taken;
      left -= taken;
    }
    compress_(state_, data, left / 64);
    if (left % 64 != 0) std::memcpy(pending_.data(), data + left / 64 * 64, left % 64);
  }

  Digest digest() const {
    Sha256 last = *this;
    const std::uint64_t bits = length_ * 8;
    std::string padding(1 + (119 - length_ % 64) % 64, '\0');
    padding[0] = static_cast<char>(0x80u);
    for (int k = 7; k >= 0; --k) padding.push_back(static_cast<char>(bits >> (8 * k) & 0xFF));
    last.update(padding);
    Digest digest;
    for (std::size_t k = 0; k < 32; ++k)
      digest[k] = static_cast<unsigned char>(last.state_[k / 4] >> (24 - 8 * (k % 4)) & 0xFF);
    return digest;
  }

  // All that later updates depend on, to be taken up by `from_saved` in another process.
  std::string saved() const {
    std::string bytes;
    for (const std::uint32_t word : state_)
      for (int k = 3; k >= 0; --k) bytes.push_back(static_cast<char>(word >> (8 * k) & 0xFF));
    for (int k = 7; k >= 0; --k) bytes.push_back(static_cast<char>(length_ >> (8 * k) & 0xFF));
    bytes.append(reinterpret_cast<const char*>(pending_.data()), length_ % 64);
    return bytes;
  }

  static Sha256 from_saved(std::string_view bytes) {
    const auto byte = [&bytes](std::size_t k) { return static_cast<std::uint32_t>(static_cast<unsigned char>(bytes[k])); };
    Sha256 hash;
    if (bytes.size() < 40) throw std::invalid_argument("not the saved state of a SHA-256");
    for (std::size_t k = 0; k < 32; ++k) hash.state_[k / 4] = hash.state_[k / 4] << 8 | byte(k);
    for (std::size_t k = 32; k < 40; ++k) hash.length_ = hash.length_ << 8 | byte(k);
    if (bytes.size() != 40 + hash.length_ % 64) throw std::invalid_argument("not the saved state of a SHA-256");
    std::memcpy(hash.pending_.data(), bytes.data() + 40, bytes.size() - 40);
    return hash;
  }

 private:
  sha256_detail::Compress compress_;
  sha256_detail::State state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::uint64_t length_ = 0;
  std::array<unsigned char, 64> pending_{};
};

}  // namespace cpt
