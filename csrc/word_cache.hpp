// Tokens of short stretches of text that were met before.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace cpt {

// A stretch of at most 15 bytes, and its length, in two words.
struct WordKey {
  static constexpr std::size_t kMaxBytes = 15;

  // Reads 16 bytes from `text`, whatever `bytes` is.
  static WordKey of(const char* text, std::size_t bytes) {
    static constexpr auto kMasks = [] {
      std::array<std::array<std::uint64_t, 2>, kMaxBytes + 1> masks{};
      for (std::size_t k = 0; k <= kMaxBytes; ++k) {
        masks[k][0] = k >= 8 ? ~std::uint64_t{0} : (std::uint64_t{1} << (8 * k)) - 1;
        masks[k][1] = k <= 8 ? 0 : (std::uint64_t{1} << (8 * (k - 8))) - 1;
      }
      return masks;
    }();
    WordKey key;
    std::memcpy(&key.low, text, 8);
    std::memcpy(&key.high, text + 8, 8);
    key.low &= kMasks[bytes][0];
    key.high = (key.high & kMasks[bytes][1]) | (std::uint64_t{bytes} << 56);
    return key;
  }

  bool operator==(const WordKey& other) const { return ((low ^ other.low) | (high ^ other.high)) == 0; }

  std::uint64_t low;
  std::uint64_t high;
};

struct Word {
  static constexpr std::size_t kMaxTokens = 3;

  WordKey key;
  std::array<std::uint32_t, kMaxTokens> tokens;
  std::uint16_t count;
  std::uint16_t byte_tokens;
};

// Buckets of two words; a new word takes the place of the older one. Its size never changes.
//
// Where little is met again it costs more than it saves. So it counts how much of the text in the words it was asked
// for was known; after a stretch with less than one byte in kLeastKnown it is passed over for a while, then tried again.
class WordCache {
 public:
  static constexpr unsigned kBucketBits = 15;
  static constexpr std::int64_t kFirstBytes = 1 << 18;  // while it is filled
  static constexpr std::int64_t kTriedBytes = 1 << 16;
  static constexpr std::int64_t kPassedBytes = 1 << 19;
  static constexpr std::int64_t kLeastKnown = 3;

  WordCache() : words_(std::size_t{2} << kBucketBits) {}

  // Whether words are to be looked for.
  bool is_worth_asking() const { return asking_; }

  // Counts words that are behind: their bytes, and those of the words that were known.
  void count(std::size_t bytes, std::size_t known) {
    known_ += static_cast<std::int64_t>(known);
    left_ -= static_cast<std::int64_t>(bytes);
    if (left_ <= 0) begin_stretch();
  }

  // The place of a word: asked for early, it is there when the word is looked for.
  Word* bucket(const WordKey& key) {
    std::uint64_t hash = (key.low ^ (key.high * 0xd6e8feb86659fd93u)) * 0x9e3779b97f4a7c15u;
    hash = (hash ^ (hash >> 32)) * 0x9e3779b97f4a7c15u;
    Word* const found = &words_[(hash >> (64 - kBucketBits)) * 2];
    __builtin_prefetch(found);
    return found;
  }

  static const Word* find(const Word* bucket, const WordKey& key) {
    const Word* const word = bucket + !(bucket[0].key == key);  // no branch: both are as likely
    return word->key == key ? word : nullptr;
  }

  static void put(Word* bucket, const Word& word) {
    bucket[1] = bucket[0];
    bucket[0] = word;
  }

 private:
  void begin_stretch() {
    asking_ = !asking_ || known_ * kLeastKnown >= asked_;
    asked_ = left_ = asking_ ? kTriedBytes : kPassedBytes;
    known_ = 0;
  }

  bool asking_ = true;
  std::int64_t asked_ = kFirstBytes;  // bytes of words in this stretch
  std::int64_t left_ = kFirstBytes;   // of them
  std::int64_t known_ = 0;            // of those that were looked for
  std::vector<Word> words_;  // a word of length 0 is an empty place: no key equals it
};

}  // namespace cpt
